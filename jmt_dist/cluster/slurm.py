"""The SLURM side of a submission: one job array, then a dependent job that compares (DESIGN section 11)."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from typing import Any

from jmt_dist.cluster import site, status
from jmt_dist.cluster.plan import Plan
from jmt_dist.errors import UserError


def array_parameters(plan: Plan) -> dict[str, Any]:
    """submitit's parameters of the fold array.

    The lines after the ranks close a crashed start and put the job back into the queue: they also run when a rank was killed
    (out of memory, say) and no Python of ours is left to do it.
    """
    crash = shlex.join([site.python(), "-m", "jmt_dist.cluster.crash", str(plan.out), plan.submission, str(plan.site.tries)])
    teardown = ["code=$?", f'if [ "$code" -ne 0 ]; then {crash} "$code" {shlex.join(plan.todo)}; fi', 'exit "$code"']
    parameters = site.slurm_parameters(plan.site, name=plan.recipe.name, snapshot=plan.snapshot, out=plan.out, teardown=teardown)
    if plan.share:
        words = [str(plan.out), str(len(plan.share)), *map(str, plan.share), *plan.todo]
        parameters["setup"] = [*parameters["setup"], shlex.join([site.python(), "-m", "jmt_dist.cluster.share", *words])]
    if plan.after:
        parameters["dependency"] = f"afterany:{plan.after}"
    return parameters


def scripts(plan: Plan) -> list[tuple[str, str]]:
    """(title, text) of the sbatch scripts a submission would send, made by submitit itself."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{shlex.quote(site.python())} -u -m submitit.core._submit {shlex.quote(str(plan.jobs))}"
    parameters = array_parameters(plan)
    if len(plan.todo) > 1:  # submitit submits a single job without --array
        parameters["map_count"] = len(plan.todo)
    array = _make_sbatch_string(command=command, folder=plan.jobs, **parameters)
    found = [(f"folds {', '.join(plan.todo)}", array)]
    if plan.compare:
        after = _compare_parameters(plan, "<array>")
        found.append(("comparison", _make_sbatch_string(command=command, folder=plan.jobs / "compare", **after)))
    return found


def submit_array(plan: Plan) -> str:
    """Submit the array and its comparison; returns the array's job id. Raises UserError with SLURM's own words."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env

    from jmt_dist.cluster.job import FoldJob

    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError("sbatch and srun are not on this machine", "Submit from a login node, or use site=slurm/sites/local.yaml.")
    plan.jobs.mkdir(parents=True)
    # where SLURM's configuration is, and the user's own defaults for sbatch: submitit would drop them with the rest
    kept = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or name.startswith("SBATCH_")}
    try:
        with clean_env():  # a submission from within a job must not inherit that job's shape
            os.environ.update(kept)
            # submitit counts timeouts itself; ours (site.tries, over stops of every kind) is the smaller number
            executor = SlurmExecutor(plan.jobs, max_num_timeout=plan.site.tries)
            executor.update_parameters(**array_parameters(plan))
            jobs = executor.submit_array([FoldJob(plan, fold) for fold in plan.todo])
            array = jobs[0].job_id.split("_")[0]
            for fold in plan.todo:
                status.update_status(plan.out, fold, state="waiting", reason="")
            _write_jobs(plan, array, [job.job_id for job in jobs])
            compare = _submit_comparison(plan, array) if plan.compare else ""
    except (FailedJobError, FailedSubmissionError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"SLURM refused the job: {words}", "See the site file, and what check_site.py says of it.") from None
    _write_jobs(plan, array, [job.job_id for job in jobs], compare)
    return array


def _submit_comparison(plan: Plan, array: str) -> str:
    from submitit import SlurmExecutor

    from jmt_dist.cluster.job import CompareJob

    executor = SlurmExecutor(plan.jobs / "compare")
    executor.update_parameters(**_compare_parameters(plan, array))
    return str(executor.submit(CompareJob(plan)).job_id)


def _compare_parameters(plan: Plan, array: str) -> dict[str, Any]:
    return site.compare_parameters(plan.site, name=plan.recipe.name, snapshot=plan.snapshot, out=plan.out, dependency=f"afterany:{array}")


def _write_jobs(plan: Plan, array: str, jobs: list[str], compare: str = "") -> None:
    entries = [
        {"fold": fold, "job": job, "log": str(plan.jobs / f"{job}_0_log.out"), "folder": str(plan.jobs)}
        for fold, job in zip(plan.todo, jobs, strict=True)
    ]
    head = {"executor": "slurm", "submission": plan.submission, "folds": list(plan.folds), "array": array, "compare": compare}
    status.write_json(plan.out / "jobs.json", {**head, "jobs": entries})


def queue(jobs: dict[str, Any]) -> dict[str, str]:
    """State in SLURM's queue by job id (`123_0`, or `123` for one fold) of what jobs.json names; gone jobs are absent.

    Raises UserError where squeue itself does not answer.
    """
    ids = [str(jobs[name]) for name in ("array", "compare") if jobs.get(name)]
    if not ids:
        return {}
    states: dict[str, str] = {}
    for job in ids:  # one by one: squeue refuses the whole list for one id it has forgotten
        states.update(squeue(job))
    return states


def squeue(job: str) -> dict[str, str]:
    """State by job id of a job, or of the tasks of an array, where SLURM still has them in its queue."""
    words = ["squeue", "--noheader", "--array", "--jobs", job, "--format", "%i|%T"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"squeue does not answer ({error})", "Ask on a machine with SLURM's commands.") from None
    if answer.returncode:
        if "Invalid job id" in answer.stderr:
            return {}
        raise UserError(f"squeue failed: {' '.join(answer.stderr.split())}", "Is slurmctld reachable? See check_site.py.")
    lines = (line.split("|") for line in answer.stdout.splitlines() if "|" in line)
    return {identity.strip(): state.strip() for identity, state in lines}


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
