"""Compare the folds of one experiment with the paper's Table 1, or several experiments with one another.

    python launch/compare_runs.py out=runs/demo
    python launch/compare_runs.py out=runs/demo fixture=fixture/fixture.json     also the ceilings that the fixture allows
    python launch/compare_runs.py out=runs/paper units=[video59] frames=true     curves of chosen units, with faces
    python launch/compare_runs.py out=runs/grid                                  a sweep's folder: its runs side by side, ranked
    python launch/compare_runs.py out=runs/grid reference=best                   each against the best, not against jmt
    python launch/compare_runs.py 'runs=[runs/paper, runs/reference]' out=runs/both
    python launch/compare_runs.py store=sqlite:///runs/mlflow.db 'experiments=[paper]' 'tags={site: gpu}' out=runs/from-mlflow

Prints the tables; writes table1.csv (or comparison.csv), the same as Markdown and LaTeX, and report.html, which needs no other file.
Of one experiment also units.csv and smoothing.json; its tables are stored in its MLflow run. Several are ranked (ranking.csv), each
compared by paired bootstrap over videos with `reference`: by default the run of jmt where others have other fusion models, else the
best. Folds without a result are listed, and the exit code is then 3.
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

    out: str = Field("", description="run folder, or a sweep's folder; with runs= or store=: folder for the comparison")
    runs: list[str] = Field([], description="run folders and sweeps' folders to compare with one another; empty: the folds of out")
    store: str = Field("", description="MLflow tracking URI: compare the runs that it holds, by experiments= and tags=")
    experiments: list[str] = Field([], description="with store=: names of experiments; empty: all")
    tags: dict[str, str] = Field({}, description="with store=: tags that a run must carry")
    reference: str = Field(
        "",
        description="of several runs: the one that all are compared with, by name, folder or model, or `best`; empty: jmt, else the best",
    )
    fixture: str = Field("", description="fixture.json of the fixture that was trained on, for its ceilings")
    fold: str = Field("", description="fold whose units are shown one by one; empty: the first that has predictions")
    units: list[str] = Field([], description="units whose curves are shown; empty: the best two and the worst two")
    frames: bool = Field(
        False, description="faces under the cursor; the licence forbids sharing such a report (the fixture's always has them)"
    )


def main(words: list[str]) -> int:
    """Compare, print, write."""
    options = build(CompareOptions, [word_layer(word) for word in words])
    if not options.out:
        raise UsageError("`out` is missing", "Write out=<run folder>, or out=<folder for the comparison> with runs=[…] or store=….")
    if options.store and options.runs:
        raise UsageError("`store` and `runs` both say what to compare", "Leave out one of them.")
    if (options.experiments or options.tags) and not options.store:
        raise UsageError("`experiments` and `tags` are looked up in `store`", "Write store=<MLflow tracking URI>.")
    from jmt_dist.report.content import Wishes
    from jmt_dist.report.select import paths, run_folders, stored
    from jmt_dist.report.write import compare_run, compare_runs, show

    out, folders = Path(options.out), [Path(folder) for folder in options.runs]
    if not options.store and not folders and not (out / "recipe.yaml").is_file():
        folders = run_folders(out)
    several = bool(options.store or folders)
    if several and (options.fixture or options.units or options.frames or options.fold):
        raise UsageError("`fixture`, `fold`, `units` and `frames` go with the folds of one run", "Leave out runs= and store=.")
    if options.reference and not several:
        raise UsageError("`reference` goes with several runs", "Leave it out, or give runs=[…], store=… or a sweep's folder.")
    if several:
        runs = stored(options.store, options.experiments, options.tags, out / "from-mlflow") if options.store else paths(folders)
        print(f"comparing {len(runs)} runs: {', '.join(one.name for one in runs)}")
        result = compare_runs(runs, out, options.reference)
    else:
        print(f"comparing the folds of {out} with the paper's Table 1")
        wishes = Wishes(options.fold, tuple(options.units), options.frames)
        result = compare_run(out, Path(options.fixture) if options.fixture else None, wishes)
    show(result)
    return OMISSIONS if result.omissions else OK


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", CompareOptions)])
