"""Verify a shard folder: tars, indexes, manifest, folds, and every sample in it. Exit code 1 on any defect.

python shards/verify_shards.py shards=shards-affwild2 workers=16
python shards/verify_shards.py shards=shards-affwild2 against=/data/affwild2     also compares with the source files
"""

from __future__ import annotations

from jmt_dist.config import VerifyOptions
from jmt_dist.program import FAILED, OK, run


def main(words: list[str]) -> int:
    """Verify as the words say."""
    from jmt_dist.data.verify import remedies, verify
    from jmt_dist.recipe import build, word_layer

    options = build(VerifyOptions, [word_layer(word) for word in words])
    verified = verify(options)
    for defect in verified.defects:
        print(f"defect: {defect}")
    compared = f", {verified.compared:,} compared with {options.against}" if options.against else ""
    print(f"{verified.samples:,} samples verified{compared}; {len(verified.defects)} defects")
    for line in remedies(verified.defects):
        print(line)
    print(options.shards)
    return FAILED if verified.defects else OK


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", VerifyOptions)])
