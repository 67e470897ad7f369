"""The SLURM side of a submission: job arrays, one task per fold, then a dependent job that compares (DESIGN section 11)."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmt_dist.cluster import site, status
from jmt_dist.cluster.plan import Plan
from jmt_dist.config import Site
from jmt_dist.errors import UserError


@dataclass(frozen=True)
class Array:
    """One job array: tasks are (plan, fold), all of one site and one submission; `after` names the array it waits for.

    `root` is the run folder, or the folder of a sweep; `jobs` takes pickles, logs and the list of tasks.
    """

    name: str
    root: Path
    jobs: Path
    tasks: tuple[tuple[Plan, str], ...]
    after: str = ""

    @property
    def first(self) -> Plan:
        """A plan of the array: its site, snapshot and submission are those of all."""
        return self.tasks[0][0]

    @property
    def list(self) -> Path:
        """The file that says which task is which fold."""
        return self.jobs / "tasks.json"


def of_plan(plan: Plan) -> Array:
    """The array of one run folder."""
    return Array(plan.recipe.name, plan.out, plan.jobs, tuple((plan, fold) for fold in plan.todo))


def array_parameters(array: Array) -> dict[str, Any]:
    """submitit's parameters of an array.

    The lines after the ranks close a crashed start and put the job back into the queue: they also run when a rank was killed
    (out of memory, say) and no Python of ours is left to do it.
    """
    crash = shlex.join([site.python(), "-m", "jmt_dist.cluster.crash", str(array.list)])
    teardown = ["code=$?", f'if [ "$code" -ne 0 ]; then {crash} "$code"; fi', 'exit "$code"']
    plan = array.first
    after = f"afterany:{array.after}" if array.after else ""
    place: dict[str, Any] = {"name": array.name, "snapshot": plan.snapshot, "out": array.root}
    return site.slurm_parameters(plan.site, **place, teardown=teardown, dependency=after)


def scripts(arrays: list[Array], compare: bool) -> list[tuple[str, str]]:
    """(title, text) of the sbatch scripts a submission would send, made by submitit itself."""
    from submitit.slurm.slurm import _make_sbatch_string

    def script(folder: Path, parameters: dict[str, Any]) -> str:
        command = f"{shlex.quote(site.python())} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        return _make_sbatch_string(command=command, folder=folder, **parameters)

    found = []
    for array in arrays:
        parameters = array_parameters(array)
        if len(array.tasks) > 1:  # submitit submits a single job without --array
            parameters["map_count"] = len(array.tasks)
        title = f"{array.name}: folds {', '.join(dict.fromkeys(fold for _, fold in array.tasks))}"
        found.append((title, script(array.jobs, parameters)))
    if compare:
        found.append(("comparison", script(arrays[-1].jobs / "compare", _compare_parameters(arrays[-1], "<array>"))))
    return found


# variables that sbatch would take over the lines of our scripts: what these always say or exclude, and what a field of a site decides
_ALWAYS_SAID = {"ARRAY_INX", "CPUS_PER_GPU", "ERROR", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "REQUEUE", "SIGNAL", "TIMELIMIT"}
_ALWAYS_SAID |= {"WAIT"}  # a submission would last until its jobs have ended
_FIELDS = {"ACCOUNT": "account", "CONSTRAINT": "constraint", "PARTITION": "partition", "QOS": "qos"}
_FIELDS |= dict.fromkeys(("GPUS", "GPUS_PER_NODE", "GPUS_PER_SOCKET", "GPUS_PER_TASK", "GRES"), "gpus_per_node")
_FIELDS |= dict.fromkeys(("MEM_PER_CPU", "MEM_PER_GPU", "MEM_PER_NODE"), "memory_gb")


def sbatch_defaults(place: Site) -> dict[str, str]:
    """The user's own defaults for sbatch, `SBATCH_ACCOUNT` and the like, where the site file leaves them open."""
    said = {*_ALWAYS_SAID, *(name for name, field in _FIELDS.items() if getattr(place, field))}
    said |= {name.upper().replace("-", "_") for name in place.extra}
    return {name: value for name, value in os.environ.items() if name.startswith("SBATCH_") and name.removeprefix("SBATCH_") not in said}


@contextmanager
def submitting(place: Site) -> Iterator[None]:
    """The environment in which submitit may call sbatch. Raises UserError, with SLURM's own words, for what it refuses."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env

    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError("sbatch and srun are not on this machine", "Submit from a login node, or use site=slurm/sites/local.yaml.")
    # where SLURM's configuration is, and the user's own defaults for sbatch: submitit would drop them with the rest
    kept = sbatch_defaults(place) | {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    try:
        with clean_env():  # a submission from within a job must not inherit that job's shape
            os.environ.update(kept)
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        words = " ".join(str(error).split())
        remedy = "See the site file, and what check_site.py says of it."
        if "job array specification" in words:
            remedy = "It may have more tasks than MaxArraySize (scontrol show config): submit fewer variants or folds at a time."
        raise UserError(f"SLURM refused the job: {words}", remedy) from None


def submit_array(array: Array) -> tuple[str, list[str]]:
    """Submit an array by one sbatch call and record its tasks in their run folders; returns its job id and those of its tasks."""
    from submitit import SlurmExecutor

    from jmt_dist.cluster.job import FoldJob

    plan = array.first
    array.jobs.mkdir(parents=True)
    tasks = [[str(task.out), fold] for task, fold in array.tasks]
    status.write_json(array.list, {"submission": plan.submission, "tries": plan.site.tries, "tasks": tasks})
    # submitit counts timeouts itself; ours (site.tries, over stops of every kind) is the smaller number
    executor = SlurmExecutor(array.jobs, max_num_timeout=plan.site.tries)
    executor.update_parameters(**array_parameters(array))
    jobs = [str(job.job_id) for job in executor.submit_array([FoldJob(task, fold) for task, fold in array.tasks])]
    identity = jobs[0].split("_")[0]
    try:
        _record(array, identity, jobs)
    except BaseException:  # a full disk, Ctrl-C: jobs that no run folder knows could be neither seen nor ended
        subprocess.run(["scancel", identity], capture_output=True, timeout=60)
        raise
    return identity, jobs


def _record(array: Array, identity: str, jobs: list[str]) -> None:
    known = set(jobs)
    for task, fold in array.tasks:
        # a job may have started by now: what it has written stays
        if status.read_status(task.out, fold).get("job") not in known:
            status.update_status(task.out, fold, state="waiting", reason="")
    for out in dict.fromkeys(task.out for task, _ in array.tasks):
        _write_jobs(array, out, identity, jobs)


def submit_comparison(array: Array, identity: str, root: Path, compare: str) -> str:
    """Submit the job that compares what an array has done; returns its id."""
    from submitit import SlurmExecutor

    from jmt_dist.cluster.job import CompareJob

    executor = SlurmExecutor(array.jobs / "compare")
    executor.update_parameters(**_compare_parameters(array, identity))
    return str(executor.submit(CompareJob(root, compare)).job_id)


def _compare_parameters(array: Array, identity: str) -> dict[str, Any]:
    plan = array.first
    return site.compare_parameters(plan.site, name=array.name, snapshot=plan.snapshot, out=array.root, dependency=f"afterany:{identity}")


def _write_jobs(array: Array, out: Path, identity: str, jobs: list[str]) -> None:
    entries = [
        {"fold": fold, "job": job, "log": str(array.jobs / f"{job}_0_log.out"), "folder": str(array.jobs)}
        for (plan, fold), job in zip(array.tasks, jobs, strict=True)
        if plan.out == out
    ]
    plan = next(plan for plan, _ in array.tasks if plan.out == out)
    status.write_json(out / "jobs.json", {"executor": "slurm", **plan.describe(), "array": identity, "jobs": entries})


@dataclass(frozen=True)
class Queued:
    """A job as squeue shows it: state (PENDING, RUNNING, …), why it waits, and its node(s)."""

    state: str
    reason: str = ""
    nodes: str = ""


def squeue(job: str) -> dict[str, Queued]:
    """Jobs by id (`123_0`, or `123` for one fold) of a job, or of the tasks of an array, where SLURM still has them in its queue.

    Raises UserError where squeue itself does not answer.
    """
    words = ["squeue", "--noheader", "--array", "--jobs", job, "--format", "%i|%T|%r|%N"]
    # SQUEUE_STATES, SQUEUE_PARTITION, … of the user would hide jobs from us, which then seem to be gone
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"squeue does not answer ({error})", "Ask on a machine with SLURM's commands.") from None
    if answer.returncode:
        if "Invalid job id" in answer.stderr:
            return {}
        raise UserError(f"squeue failed: {' '.join(answer.stderr.split())}", "Is slurmctld reachable? See check_site.py.")
    lines = ([field.strip() for field in line.split("|")] for line in answer.stdout.splitlines() if "|" in line)
    return {fields[0]: Queued(fields[1], "" if fields[2] == "None" else fields[2], fields[3]) for fields in lines}


def sacct(job: str) -> str:
    """The state SLURM's accounting remembers of a job that has left the queue, without details; empty where there is none."""
    words = ["sacct", "--parsable2", "--allocations", "--duplicates", "-j", job, "--format", "JobID,State"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    rows = [line.split("|") for line in answer.stdout.splitlines()] if answer.returncode == 0 else []
    states = [row[1].split()[0] for row in rows if row[0] == job and row[1].strip()]  # `CANCELLED by 1000`
    return states[-1] if states else ""  # the last of its starts
