"""Pack Aff-Wild2, as its owners ship it, into WebDataset shards with fold indexes.

    python shards/pack_shards.py source=/data/affwild2 out=shards-affwild2 workers=16
    python shards/pack_shards.py source=/data/affwild2 out=shards-affwild2 dry=true

Run again after an interruption: only what is missing is made. Run with other folds.policy or folds.seed on a
packed folder: only index files are added. Units that cannot be packed are left out and listed (exit code 3).
"""

from __future__ import annotations

from jmt_dist.config import PackOptions
from jmt_dist.program import OK, OMISSIONS, run


def main(words: list[str]) -> int:
    """Pack as the words say."""
    from jmt_dist.data.pack import pack
    from jmt_dist.recipe import build, word_layer

    options = build(PackOptions, [word_layer(word) for word in words])
    packed = pack(options)
    if packed.manifest is None:
        print("dry run: nothing written")
        return OK
    print(packed.manifest.folder)
    return OMISSIONS if packed.report is not None and packed.report.omitted else OK


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", PackOptions)])
