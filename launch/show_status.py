"""Show how the folds of a run folder or of a sweep are doing: one row per fold, and the last log lines of whatever failed.

    python launch/show_status.py out=runs/demo
    python launch/show_status.py out=runs/demo --watch        until all jobs have ended (Ctrl-C ends the watching, not the jobs)

The heartbeat is the age of the last sign of life, which a job gives every five seconds; `lost` is a fold whose job is gone.
"""

from __future__ import annotations

from pathlib import Path

from jmt_dist.cluster.options import StatusOptions
from jmt_dist.program import run
from jmt_dist.recipe import build, word_layer


def main(words: list[str]) -> int:
    """Print the table; 1 where a fold has failed or its job is gone."""
    options = build(StatusOptions, [word_layer(word) for word in words])
    from jmt_dist.cluster import watch

    out = Path(options.out).expanduser().resolve()
    return watch.watch(out, options.lines, options.every) if options.watch else watch.show(out, options.lines)


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", StatusOptions)])
