"""Compare the folds of one experiment with the paper's Table 1, or several experiments with one another.

    python launch/compare_runs.py out=runs/demo
    python launch/compare_runs.py out=runs/demo fixture=fixture/fixture.json     also the ceilings that the fixture allows
    python launch/compare_runs.py out=runs/grid                                  a sweep's folder: its runs side by side
    python launch/compare_runs.py 'runs=[runs/paper, runs/reference]' out=runs/both

Prints the tables; writes table1.csv (or comparison.csv), the same as Markdown, and report.html, which needs no other file.
The tables of one experiment are also stored in its MLflow run. Folds without a result are listed, and the exit code is then 3.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from jmt_dist.config import Options
from jmt_dist.errors import UsageError
from jmt_dist.program import OK, OMISSIONS, run
from jmt_dist.recipe import build, word_layer


class CompareOptions(Options):
    """What to compare."""

    out: str = Field("", description="run folder, or a sweep's folder; with runs=: folder for the comparison")
    runs: list[str] = Field([], description="run folders to compare with one another; empty: the folds of out")
    fixture: str = Field("", description="fixture.json of the fixture that was trained on, for its ceilings")


def main(words: list[str]) -> int:
    """Compare, print, write."""
    options = build(CompareOptions, [word_layer(word) for word in words])
    if not options.out:
        raise UsageError("`out` is missing", "Write out=<run folder>, or out=<folder for the comparison> with runs=[…].")
    from jmt_dist.track.report import compare_run, compare_runs, run_folders, show

    out, folders = Path(options.out), [Path(folder) for folder in options.runs]
    if not folders and not (out / "recipe.yaml").is_file():
        folders = run_folders(out)
    if folders and options.fixture:
        raise UsageError("`fixture` goes with the folds of one run", "Leave out runs=.")
    if folders:
        print(f"comparing {len(folders)} runs: {', '.join(map(str, folders))}")
        result = compare_runs(folders, out)
    else:
        print(f"comparing the folds of {out} with the paper's Table 1")
        result = compare_run(out, Path(options.fixture) if options.fixture else None)
    show(result)
    return OMISSIONS if result.omissions else OK


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", CompareOptions)])
