"""Showing how the folds of a run folder or of a sweep are doing: once, or until their jobs have ended."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from jmt_dist.cluster import control, slurm, status
from jmt_dist.cluster.progress import Progress, plain, table
from jmt_dist.cluster.slurm import Queued
from jmt_dist.errors import UserError
from jmt_dist.program import FAILED, OK, OMISSIONS

PATIENCE_SECONDS = 1800.0
BAD = ("failed", "lost")
COMPARISON = "comparison"
ALIVE = ("running", "waiting", "pending", "configuring", "completing", "requeued", "requeue_hold", "suspended", "resizing")
# what accounting says of a comparison that has left the queue; it may be behind
_ENDED = {"COMPLETED": "done", "CANCELLED": "stopped", "PENDING": "completing", "RUNNING": "completing", "REQUEUED": "completing"}


def rows(out: Path) -> list[status.Row]:
    """One row per fold of a run folder, or per run and fold of a sweep, and one of SLURM's job that compares them.

    Raises UserError where nothing was submitted.
    """
    runs, asked = control.runs_of(out), dict[str, dict[str, Queued]]()
    found: list[status.Row] = []
    for run in runs:
        if run != out and not (run / "jobs.json").is_file():
            continue  # a part of the sweep that has yet to be submitted, or had nothing to do
        jobs = control.read_jobs(run)
        alive = control.alive_states(jobs, asked)
        for fold in jobs.get("folds", []):
            found.append(status.row(run, fold, jobs, alive, fold if run == out else f"{run.name} {fold}"))
    return found + _comparison(out)


def _comparison(out: Path) -> list[status.Row]:
    """The job that writes the table once the folds have ended: where it fails, nothing else would say so."""
    file = out / (control.SWEEP if (out / control.SWEEP).is_file() else "jobs.json")
    record = status.read_json(file)
    job = str(record.get("compare") or "")
    if not job:
        return []
    reason, node, known = "", "", slurm.squeue(job).get(job)
    if known is not None:
        state, reason, node = known.state.lower(), known.reason, known.nodes
    elif any(table.stat().st_mtime >= file.stat().st_mtime for table in (*out.glob("table1.csv"), *out.glob("comparison.csv"))):
        state = "done"  # by this job, or by hand after it failed
    else:
        ended = slurm.sacct(job)
        state = _ENDED.get(ended, "failed")
        reason = f"{ended or 'no table'}; run: python launch/compare_runs.py out={shlex.quote(str(out))}" if state == "failed" else ""
    home = out / "jobs" / str(record.get("submission", ""))
    log = next((str(path) for folder in ("compare", "*/compare") for path in home.glob(f"{folder}/{job}_0_log.out")), "")
    return [status.Row(COMPARISON, state, "", "", "", "", "", job, node, "", log, reason)]


def show(out: Path, lines: int) -> int:
    """Print the rows and the last log lines of what failed; 1 where a fold has failed or its job is gone before its end."""
    from rich.console import Console

    found, console = rows(out), Console()
    if console.is_terminal:
        console.print(table(found, str(out)))
    else:
        for row in found:
            words = [plain(row), f"job {row.job}" if row.job else "", row.node, row.heartbeat and f"heartbeat {row.heartbeat}", row.log]
            print("  ".join(filter(None, words)))
    _print_logs(found, lines)
    print(out)
    return FAILED if any(row.state in BAD for row in found) else OK


def watch(out: Path, lines: int, every: float = 5.0) -> int:
    """Show the rows until no job is left, then what failed; 0 all done, 3 some folds or their comparison are not, 1 no fold is."""
    latest, heard = rows(out), time.monotonic()

    def current() -> list[status.Row]:
        return latest

    with Progress(str(out), current) as progress:
        progress.show(force=True)
        while any(row.state in ALIVE for row in latest):
            time.sleep(every)
            try:
                latest, heard = rows(out), time.monotonic()
            except UserError as error:  # a controller that is restarted is away for minutes; the jobs go on meanwhile
                if time.monotonic() - heard > PATIENCE_SECONDS:
                    raise
                progress.say(f"{error.sentence}; asking again")
            progress.show()
    _print_logs(latest, lines)
    folds = [row for row in latest if row.fold != COMPARISON]
    done = sum(row.state == "done" for row in folds)
    print(f"{done} of {len(folds)} folds are done")
    print(out)
    return OK if all(row.state == "done" for row in latest) else OMISSIONS if done else FAILED


def _print_logs(found: list[status.Row], lines: int) -> None:
    for row in found:
        if row.state not in BAD or not row.log or not lines:
            continue
        last = status.last_lines(Path(row.log), lines)
        print(f"\n{row.fold}: {'the last lines of' if last else 'there is no log'} {row.log}{':' if last else ''}")
        for line in last:
            print(f"  {line}")
