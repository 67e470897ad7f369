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

from jmt_dist.cluster import slurm, status
from jmt_dist.cluster.lease import SAME, is_running
from jmt_dist.cluster.slurm import Queued
from jmt_dist.errors import UserError

SWEEP = "sweep.json"
STOP_SECONDS = 150.0  # the local scheduler gives its jobs two minutes to save


def read_jobs(out: Path) -> dict[str, Any]:
    """jobs.json of a run folder. Raises UserError where nothing was ever submitted there."""
    if not out.is_dir():
        raise UserError(f"there is no run folder {out}", "Its path is what submit_folds.py printed last.")
    jobs = status.read_json(out / "jobs.json")
    if not jobs:
        raise UserError(f"nothing was submitted from {out}", "Run submit_folds.py, or give its out= folder.")
    return jobs


def runs_of(out: Path) -> list[Path]:
    """The run folders a folder stands for: itself, or those of a sweep, stages that several of them share first."""
    return [out / name for name in status.read_json(out / SWEEP).get("runs", [])] or [out]


def alive_states(jobs: dict[str, Any], asked: dict[str, dict[str, Queued]] | None = None) -> dict[str, Queued]:
    """Each fold's job where its scheduler still knows it, by fold. `asked` keeps squeue's answers for further run folders."""
    entries = jobs.get("jobs", [])
    if jobs.get("executor") == "slurm":
        asked, array = {} if asked is None else asked, str(jobs.get("array", ""))
        if array and array not in asked:
            asked[array] = slurm.squeue(array)
        return {entry["fold"]: asked[array][entry["job"]] for entry in entries if entry["job"] in asked.get(array, {})}
    alive = {entry["fold"]: Queued("RUNNING") for entry in entries if members(entry)}
    if is_running(jobs.get("scheduler", {})):  # the folds it has yet to start
        alive = {fold: Queued("WAITING") for fold in jobs.get("folds", [])} | alive
    return alive


def live_jobs(out: Path, asked: dict[str, dict[str, Queued]] | None = None) -> dict[str, str]:
    """Jobs of an earlier submission that still exist: fold to job id; empty for a new run folder."""
    jobs = status.read_json(out / "jobs.json")
    if not jobs:
        return {}
    alive = alive_states(jobs, asked)
    return {entry["fold"]: str(entry["job"]) for entry in jobs.get("jobs", []) if entry["fold"] in alive}


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
        if same and ours and info["create_time"] >= float(entry["created"]) - SAME:
            found.append(process.pid)
    return found


def cancel(out: Path, say: Callable[[str], None] = print) -> int:
    """End everything of the last submission of a run folder or a sweep; returns how many jobs were ended. Checkpoints stay."""
    runs = runs_of(out)
    jobs = {run: read_jobs(run) for run in runs if run == out or (run / "jobs.json").is_file()}
    count = sum(_cancel_local(run, found, say) for run, found in jobs.items() if found.get("executor") != "slurm")
    ours = {run: found for run, found in jobs.items() if found.get("executor") == "slurm"}
    return count + _cancel_slurm(out, ours, say) if ours else count


def _cancel_slurm(out: Path, runs: dict[Path, dict[str, Any]], say: Callable[[str], None]) -> int:
    asked: dict[str, dict[str, Queued]] = {}
    alive = {run: alive_states(jobs, asked) for run, jobs in runs.items()}
    ids = [str(entry["job"]) for run, jobs in runs.items() for entry in jobs["jobs"] if entry["fold"] in alive[run]]
    comparisons = [str(found.get("compare") or "") for found in (*runs.values(), status.read_json(out / SWEEP))]
    ids += [job for job in comparisons if job]
    for first in range(0, len(ids), 500):  # a command line has its limits
        answer = subprocess.run(["scancel", *ids[first : first + 500]], capture_output=True, text=True, timeout=60)
        if answer.returncode and "Invalid job id" not in answer.stderr:
            raise UserError(f"scancel failed: {' '.join(answer.stderr.split())}", "Is slurmctld reachable? See check_site.py.")
    for run, folds in alive.items():
        for fold in folds:
            if status.read_status(run, fold).get("state") == "done":
                continue  # its job was about to leave the queue
            say(f"cancelled {fold if run == out else f'{run.name} {fold}'}")
            status.update_status(run, fold, state="stopped", reason="cancelled by cancel_jobs.py")
    return sum(map(len, alive.values()))


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
