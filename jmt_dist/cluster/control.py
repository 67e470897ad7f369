"""What is still alive of a submission, and how to end it: processes on this machine, or jobs in SLURM's queue."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from jmt_dist.cluster import status
from jmt_dist.errors import UserError

STOP_SECONDS = 150.0  # the local scheduler gives its jobs two minutes to save
_SAME = 1.0  # seconds: two readings of one process's start differ by less


def read_jobs(out: Path) -> dict[str, Any]:
    """jobs.json of a run folder. Raises UserError where nothing was ever submitted there."""
    if not out.is_dir():
        raise UserError(f"there is no run folder {out}", "Its path is what submit_folds.py printed last.")
    jobs = status.read_json(out / "jobs.json")
    if not jobs:
        raise UserError(f"nothing was submitted from {out}", "Run submit_folds.py, or give its out= folder.")
    return jobs


def alive_states(out: Path, jobs: dict[str, Any]) -> dict[str, str]:
    """State of each fold's job where its scheduler still knows it, by fold."""
    entries = jobs.get("jobs", [])
    if jobs.get("executor") == "slurm":
        from jmt_dist.cluster.slurm import queue

        states = queue(jobs)
        return {entry["fold"]: states[entry["job"]] for entry in entries if entry["job"] in states}
    alive = {entry["fold"]: "RUNNING" for entry in entries if members(entry)}
    if is_running(jobs.get("scheduler", {})):  # the folds it has yet to start
        alive = {fold: "WAITING" for fold in jobs.get("folds", [])} | alive
    return alive


def live_jobs(out: Path) -> dict[str, str]:
    """Jobs of an earlier submission that still exist: fold to job id; empty for a new run folder."""
    jobs = status.read_json(out / "jobs.json")
    if not jobs:
        return {}
    alive = alive_states(out, jobs)
    return {entry["fold"]: str(entry["job"]) for entry in jobs.get("jobs", []) if entry["fold"] in alive}


def is_running(process: dict[str, Any]) -> bool:
    """Whether the process that {"pid", "created"} names still exists: a process that got its id later is not it."""
    try:
        found = psutil.Process(int(process["pid"]))
        return abs(found.create_time() - float(process["created"])) < _SAME and found.status() != psutil.STATUS_ZOMBIE
    except (KeyError, psutil.Error):
        return False


def members(entry: dict[str, Any]) -> list[int]:
    """Our processes in the session of a local job: its controller, its ranks and what they started."""
    if "pid" not in entry:
        return []
    found = []
    for process in psutil.process_iter(["create_time", "uids", "status"]):
        try:
            same = os.getsid(process.pid) == int(entry["pid"])
        except (ProcessLookupError, PermissionError):
            continue
        info = process.info
        ours = info["uids"] is not None and info["uids"].effective == os.geteuid() and info["status"] != psutil.STATUS_ZOMBIE
        if same and ours and info["create_time"] >= float(entry["created"]) - _SAME:
            found.append(process.pid)
    return found


def show(folder: str) -> int:
    """Print one row per fold of a run folder; 1 where a fold has failed or its job is gone before its end."""
    from rich.console import Console

    from jmt_dist.cluster.progress import plain, table

    out = Path(folder).expanduser().resolve()
    jobs = read_jobs(out)
    alive = alive_states(out, jobs)
    rows = [status.row(out, fold, jobs, alive) for fold in jobs.get("folds", [])]
    console = Console()
    if console.is_terminal:
        console.print(table(rows, str(out)))
    else:
        for row in rows:
            print("  ".join(filter(None, [plain(row), f"job {row.job}" if row.job else "", row.update, row.log])))
        print(out)
    return 1 if any(row.state in ("failed", "lost") for row in rows) else 0


def cancel(out: Path, say: Callable[[str], None] = print) -> int:
    """End everything of a run folder's last submission; returns how many jobs were ended. Checkpoints stay."""
    jobs = read_jobs(out)
    if jobs.get("executor") == "slurm":
        return _cancel_slurm(out, jobs, say)
    return _cancel_local(out, jobs, say)


def _cancel_slurm(out: Path, jobs: dict[str, Any], say: Callable[[str], None]) -> int:
    alive = alive_states(out, jobs)
    ids = [str(jobs[name]) for name in ("array", "compare") if jobs.get(name)]
    answer = subprocess.run(["scancel", *ids], capture_output=True, text=True, timeout=60)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise UserError(f"scancel failed: {' '.join(answer.stderr.split())}", "Is slurmctld reachable? See check_site.py.")
    for fold in alive:
        say(f"cancelled {fold}")
        status.update_status(out, fold, state="stopped", reason="cancelled by cancel_jobs.py")
    return len(alive)


def _cancel_local(out: Path, jobs: dict[str, Any], say: Callable[[str], None]) -> int:
    """The scheduler first, which lets its jobs save; then, where there is none any more, the jobs themselves."""
    alive = [entry for entry in jobs.get("jobs", []) if members(entry)]
    scheduler = jobs.get("scheduler", {})
    if is_running(scheduler):
        say(f"asking process {scheduler['pid']} to stop; its jobs save first")
        os.kill(int(scheduler["pid"]), signal.SIGTERM)
        _wait(lambda: not is_running(scheduler))
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [pid for entry in alive for pid in members(entry)]
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        if left and number == signal.SIGTERM:
            say(f"ending {len(left)} process(es) that their scheduler left")
            _wait(lambda: not any(members(entry) for entry in alive))
    for entry in alive:
        say(f"ended {entry['fold']}")
        if status.read_status(out, entry["fold"]).get("state") == "running":
            status.update_status(out, entry["fold"], state="stopped", reason="ended by cancel_jobs.py")
    return len(alive)


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while not until() and time.monotonic() < deadline:
        time.sleep(0.2)
