"""Steps of independent calls on a site, each step one job array after the one before (packing; DESIGN sections 6 and 11).

A call takes nothing and returns [] or, for an error a user can cause, [sentence, remedy]. It must be picklable, live in
`jmt_dist`, and go on where it stopped when it is started again. Only the last step's errors are errors: it repairs the others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from submitit.core.core import Job
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import clean_env

from jmt_dist.cluster import local, site, slurm, status
from jmt_dist.cluster.plan import check_owner
from jmt_dist.cluster.snapshot import take_snapshot
from jmt_dist.config import Site
from jmt_dist.errors import UserError

Call = Callable[[], list[str]]
Steps = Sequence[tuple[str, Sequence[Call]]]
POLL_SECONDS = 1.0


def run_steps(place: Site, folder: Path, name: str, cpus: int, steps: Steps, wait: bool = True) -> bool:
    """Run the steps with `cpus` cores for each call, at most `site.parallel` calls at a time; whether they have ended.

    `folder` takes pickles, logs and a copy of the code; it is kept unless all went well (without `wait`: until `forget_steps`).
    Raises UserError: the last step's error, or SLURM's refusal.
    """
    place = place.model_copy(update={"nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0, "cpus_per_rank": cpus})
    site.check(place)
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_owner(folder)
    jobs = folder / datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    if place.executor == "local":
        _run_here(place, jobs, take_snapshot(folder).path, steps)
    else:
        _refuse_twice(folder)
        last = _submit(place, folder, jobs, name, steps)
        if not wait:
            return False
        _wait(last)
        _raise_error(last[-1][1])
    shutil.rmtree(folder, ignore_errors=True)
    return True


def forget_steps(folder: Path) -> None:
    """Remove what `run_steps` left in `folder` when it did not wait, unless one of its jobs is still in the queue."""
    jobs = status.read_json(folder / "jobs.json").get("jobs", [])
    if jobs and not any(slurm.squeue(str(job)) for job in jobs):
        check_owner(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _run_here(place: Site, jobs: Path, snapshot: str, steps: Steps) -> None:
    with clean_env():
        environment = {**os.environ, **site.job_environment(place, Path(snapshot))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [snapshot, os.environ.get("PYTHONPATH")]))
    last: list[Job[Any]] = []
    for step, calls in steps:
        waiting, last = list(enumerate(calls)), []
        running: list[subprocess.Popen[bytes]] = []
        print(f"{step}: {len(calls)} job(s), at most {place.parallel} at a time, logs in {jobs}", flush=True)
        try:
            while waiting or running:
                while waiting and len(running) < place.parallel:
                    number, call = waiting.pop(0)
                    part = jobs / f"{step}-{number}"
                    part.mkdir(mode=0o700, parents=True)
                    executor = local.GroupExecutor(part, place, environment)
                    last.append(executor.submit(call))
                    assert executor.process is not None
                    running.append(executor.process)
                time.sleep(local.POLL_SECONDS)
                for process in [process for process in running if local.ended(process)]:
                    local.kill_group(process.pid)
                    process.wait()
                    running.remove(process)
        finally:
            for process in running:
                local.kill_group(process.pid)
                process.wait()
    _raise_error(last)


def _refuse_twice(folder: Path) -> None:
    """Raises UserError where jobs of an earlier submission are still in the queue."""
    for job in status.read_json(folder / "jobs.json").get("jobs", []):
        if slurm.squeue(str(job)):
            raise UserError(f"job {job} of an earlier submission is still in the queue", f"Wait for it, or end it with scancel {job}.")


def _submit(place: Site, folder: Path, jobs: Path, name: str, steps: Steps) -> list[tuple[str, list[Job[Any]]]]:
    from submitit import SlurmExecutor

    snapshot = Path(take_snapshot(folder).path)
    submitted: list[tuple[str, list[Job[Any]]]] = []
    with slurm.submitting(place):
        for step, calls in steps:
            executor = SlurmExecutor(jobs / step, max_num_timeout=place.tries)
            after = f"afterany:{_array(submitted[-1][1])}" if submitted else ""
            title = f"{name}-{step}"
            parameters = site.slurm_parameters(place, name=title, snapshot=snapshot, out=folder, teardown=[], dependency=after)
            executor.update_parameters(**parameters)
            submitted.append((step, executor.submit_array(list(calls))))
            status.write_json(folder / "jobs.json", {"jobs": [_array(found) for _, found in submitted]})
            print(f"{step}: job {_array(submitted[-1][1])}, {len(calls)} task(s), logs in {jobs / step}", flush=True)
    return submitted


def _array(jobs: Sequence[Job[Any]]) -> str:
    return str(jobs[0].job_id).split("_")[0]


def _wait(steps: Sequence[tuple[str, Sequence[Job[Any]]]]) -> None:
    for step, jobs in steps:
        while not all(job.done() for job in jobs):
            time.sleep(POLL_SECONDS)
        print(f"{step}: ended", flush=True)


def _raise_error(jobs: Sequence[Job[Any]]) -> None:
    for job in jobs:
        try:
            said = job.result()
        except (FailedJobError, UncompletedJobError):
            raise UserError(f"job {job.job_id} failed", f"Its log is {job.paths.stdout}; the same command goes on.") from None
        if said:
            raise UserError(*said)
