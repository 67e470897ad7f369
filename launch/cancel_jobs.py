"""End the jobs of a run folder, on this machine or in SLURM's queue; checkpoints stay, and submit_folds.py goes on from them.

python launch/cancel_jobs.py out=runs/demo
"""

from __future__ import annotations

from pathlib import Path

from jmt_dist.cluster.options import RunOptions
from jmt_dist.program import OK, run
from jmt_dist.recipe import build, word_layer


def main(words: list[str]) -> int:
    """End what is alive and say what it was."""
    options = build(RunOptions, [word_layer(word) for word in words])
    from jmt_dist.cluster.control import cancel

    out = Path(options.out).expanduser().resolve()
    ended = cancel(out)
    print(f"{ended} job(s) ended" if ended else "no job was alive")
    print(out)
    return OK


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", RunOptions)])
