"""Show how the folds of a run folder are doing: one row per fold.

python launch/show_status.py out=runs/demo
"""

from __future__ import annotations

from jmt_dist.cluster.options import RunOptions
from jmt_dist.program import run
from jmt_dist.recipe import build, word_layer


def main(words: list[str]) -> int:
    """Print the table; 1 where a fold has failed or its job is gone."""
    options = build(RunOptions, [word_layer(word) for word in words])
    from jmt_dist.cluster.control import show

    return show(options.out)


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", RunOptions)])
