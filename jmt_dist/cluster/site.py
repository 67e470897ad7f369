"""What a site file means to a scheduler: times, sbatch parameters, and the environment of a job (DESIGN section 11)."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from jmt_dist.config import Site
from jmt_dist.errors import UsageError, UserError

_TIME = re.compile(r"(?:(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)|(?P<only_minutes>\d+))")
COMPARE_MINUTES = 30


def seconds(time: str) -> int:
    """A time limit in seconds: minutes (`90`), `HH:MM:SS` or `D-HH:MM:SS`, as SLURM reads them. Raises UsageError for anything else."""
    match = _TIME.fullmatch(time.strip())
    if match is None:
        raise UsageError(f"`site.time` should be minutes, HH:MM:SS or D-HH:MM:SS, not {time!r}", "One day is 24:00:00 or 1-00:00:00.")
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    total = (part["days"] * 24 + part["hours"]) * 3600 + (part["minutes"] + part["only_minutes"]) * 60 + part["seconds"]
    if total == 0:
        raise UsageError(f"`site.time` should be more than zero, not {time!r}")
    return total


def ranks(site: Site) -> int:
    """Processes of one fold job."""
    return site.nodes * site.ranks_per_node


def check(site: Site) -> None:
    """Raise UsageError, one line, where the fields of a site contradict each other."""
    limit = seconds(site.time)
    if site.signal_seconds >= limit:
        raise UsageError(
            f"`site.signal_seconds`={site.signal_seconds} is not before the end of site.time={site.time} ({limit} s)",
            "Leave the job time to work before it is asked to stop.",
        )
    if site.executor == "local" and site.nodes > 1:
        raise UsageError(f"`site.nodes`={site.nodes}, but site.executor=local is one machine", "Set site.nodes=1 or site.executor=slurm.")
    # it would stand in site.yaml, in logs and in reports; `postgresql+psycopg2://me:secret@host/runs` is a scheme as well
    if re.match(r"[\w+.\-]+://[^/@:]*:[^@]*@", site.tracking_uri):
        remedy = "Leave it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where you submit: jobs inherit them."
        if not site.tracking_uri.startswith("http"):
            remedy = "Name a tracking server in front of the database instead: launch/serve_tracking.py starts one."
        raise UsageError("`site.tracking_uri` holds a password", remedy)
    if site.gpus_per_node and site.ranks_per_node > site.gpus_per_node:
        raise UsageError(
            f"`site.ranks_per_node`={site.ranks_per_node} is more than site.gpus_per_node={site.gpus_per_node}", "Use one rank per GPU."
        )


def check_path(out: Path) -> None:
    """Raise UserError where SLURM would not take a path for what it is: in names of log files it reads `%` and `\\` as patterns."""
    found = [name for name, character in (("%", "%"), ("a backslash", "\\"), ("a line break", "\n")) if character in str(out)]
    if found:
        raise UserError(f"out={str(out)!r} holds {found[0]}, which SLURM reads as a pattern in names of log files", "Choose another out=.")


def job_environment(site: Site, snapshot: Path) -> dict[str, str]:
    """Variables every process of a job gets.

    PYTHONSAFEPATH: `python -m` would otherwise put the working folder, often the checkout, before the snapshot.
    OMP_NUM_THREADS must be set before NumPy is imported, which submitit does before our code runs.
    """
    return {
        "PYTHONPATH": str(snapshot),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(site.cpus_per_rank),
    }


def setup_lines(site: Site, snapshot: Path, out: Path) -> list[str]:
    """Shell lines of a SLURM job before its ranks start: privacy, owner check, the site's own lines, then our environment."""
    owner = f"[ -O {shlex.quote(str(out))} ] || {{ echo {shlex.quote(f'{out} belongs to another user')}; exit 1; }}"
    exports = []
    for name, value in job_environment(site, snapshot).items():
        tail = "${PYTHONPATH:+:$PYTHONPATH}" if name == "PYTHONPATH" else ""
        exports.append(f"export {name}={shlex.quote(value)}{tail}")
    # where sbatch was told --export=NONE, as some sites demand, srun would hand the ranks none of this either
    # a site's lines may `set -e`; the lines after the ranks must run all the same
    return ["umask 077", owner, *site.environment, *exports, "unset SLURM_EXPORT_ENV", "set +e"]


def slurm_parameters(site: Site, *, name: str, snapshot: Path, out: Path, teardown: list[str], dependency: str = "") -> dict[str, Any]:
    """Parameters of submitit's SlurmExecutor, in its vocabulary after conversion (`time` in minutes, rounded up)."""
    limit = seconds(site.time)
    parameters: dict[str, Any] = {
        **_queue(site),
        "job_name": _job_name(name),
        "time": -(-limit // 60),
        "nodes": site.nodes,
        "ntasks_per_node": site.ranks_per_node,
        "cpus_per_task": site.cpus_per_rank,
        "array_parallelism": site.parallel,
        "signal_delay_s": site.signal_seconds,
        "stderr_to_stdout": True,
        "setup": setup_lines(site, snapshot, out),
        "teardown": teardown,
        # since SLURM 22.05 srun no longer takes --cpus-per-task over from sbatch
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={site.cpus_per_rank}"],
        "additional_parameters": _extra(site, dependency),
    }
    if site.gpus_per_node:
        parameters["gres" if site.gres else "gpus_per_node"] = f"gpu:{site.gpus_per_node}" if site.gres else site.gpus_per_node
    if site.memory_gb:
        parameters["mem"] = f"{site.memory_gb}GB"
    return parameters


def compare_parameters(site: Site, *, name: str, snapshot: Path, out: Path, dependency: str) -> dict[str, Any]:
    """Parameters of the small job that compares the folds once they have all ended, well or badly."""
    return {
        **_queue(site),
        "job_name": _job_name(f"{name}-compare"),
        "time": COMPARE_MINUTES,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": 1,
        "stderr_to_stdout": True,
        "setup": setup_lines(site, snapshot, out),
        "additional_parameters": _extra(site, dependency),
    }


def _extra(site: Site, dependency: str) -> dict[str, Any]:
    """Further options; one without a value is a flag, such as `exclusive`. What the site's jobs wait for is waited for as well as ours."""
    found: dict[str, Any] = {"requeue": True, **{name: value or True for name, value in site.extra.items()}}
    if dependency:
        found["dependency"] = ",".join(filter(None, [dependency, site.extra.get("dependency", "")]))
    return found


def _queue(site: Site) -> dict[str, Any]:
    fields = {key: getattr(site, key) for key in ("partition", "account", "qos", "constraint", "exclude")}
    # clusters that track WCKeys refuse submitit's default one
    return {"wckey": None, **{key: value for key, value in fields.items() if value}}


def _job_name(name: str) -> str:
    return "jmt-" + re.sub(r"[^\w.\-]+", "-", name)


def visible_gpus() -> list[str]:
    """GPUs this machine lets us use, as CUDA_VISIBLE_DEVICES names them; without torch."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None:
        return [name for name in wanted.split(",") if name.strip()]
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no driver, no library: no GPU
        return []


def gpu_slots(options: Site) -> list[str] | None:
    """CUDA_VISIBLE_DEVICES of each parallel job; None leaves the variable as it is. Raises UserError with too few GPUs."""
    if options.device == "cpu":
        return [""] * options.parallel
    if not options.gpus_per_node:
        return None
    gpus, each = visible_gpus(), options.gpus_per_node
    if len(gpus) < each * options.parallel:
        raise UserError(
            f"{options.parallel} parallel jobs of {each} GPU(s) need {each * options.parallel}, and this machine offers {len(gpus)}",
            f"Set site.parallel={len(gpus) // each}." if len(gpus) >= each else "Set site.gpus_per_node=0 and site.device=cpu.",
        )
    return [",".join(gpus[slot * each : (slot + 1) * each]) for slot in range(options.parallel)]


def python() -> str:
    """The interpreter that runs jobs: the one that submits them."""
    return sys.executable
