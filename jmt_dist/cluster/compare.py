"""The last step of a submission: what is left in the spools goes to the store, then the tables and the report are written."""

from __future__ import annotations

import sys
from pathlib import Path

from jmt_dist.errors import UserError


def compare(out: Path) -> None:
    """Write Table 1 and the report of a run folder, and say what is missing in them; a store that fails does not keep them away."""
    from jmt_dist.report.write import compare_run, show

    _ship(out)
    show(compare_run(out))


def compare_sweep(out: Path) -> None:
    """Write and print the ranked table of a sweep's folder, Table 1 of every variant as CSV, and the whole report of the best one."""
    from jmt_dist.cluster.control import runs_of
    from jmt_dist.cluster.status import read_json
    from jmt_dist.report.select import paths, run_folders
    from jmt_dist.report.tables import table1_csv
    from jmt_dist.report.write import compare_run, compare_runs, show
    from jmt_dist.track.compare import read_run

    for run in runs_of(out):
        record = read_json(run / "submission.json")  # where submit_sweep.py meant the runs to be
        _ship(run, "" if (run / "parent_run.json").is_file() else str(record.get("uri") or ""))
    folders = run_folders(out)
    for folder in folders:
        (folder / "table1.csv").write_text(table1_csv(read_run(folder)), encoding="utf-8")
    if folders and any(row.score for row in read_run(folders[0]).folds):
        compare_run(folders[0])
    show(compare_runs(paths(folders), out))


def _ship(out: Path, uri: str = "") -> None:
    from jmt_dist.cluster.tracking import close_lost
    from jmt_dist.track.sync import left, sync, unclosed

    try:
        lost = close_lost(out)
    except UserError as error:
        lost = []
        print(f"tracking: {error}", file=sys.stderr)
    if left(out) or lost or unclosed(out):
        try:
            for fold in sync(out, uri):
                if fold.problem:
                    print(f"tracking: {fold.fold}: {fold.problem}", file=sys.stderr)
        except UserError as error:
            print(f"tracking: {error}", file=sys.stderr)
