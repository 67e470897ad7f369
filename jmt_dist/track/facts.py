"""What a fold's job writes into its spool first: the recipe as params; code, data, job, machine and versions as tags."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jmt_dist.track.spool import Spool

PACKAGES = ("jmt-dist", "torch", "torchvision", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "mlflow", "numpy", "submitit")


def record_start(spool: Spool, out: Path, recipe: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Record what this start of a fold works with; a later start overwrites the tags, and its params are the same.

    `recipe` is the resolved recipe (groups become dotted names), `data` the hashes of the shards' manifest and of the
    fold's index files. Does nothing for ranks other than 0, whose spool has no folder.
    """
    if spool.folder is None:
        return
    spool.params(flatten(recipe))
    data_tags = {f"data.{name}": value for name, value in data.items()}
    spool.tags({"recipe": str(recipe.get("name", "")), **code_tags(out), **data_tags, **job_tags(), **version_tags()})


def code_tags(out: Path) -> dict[str, str]:
    """Commit, changes and hash of the code, from `<out>/snapshot.json`; empty where the run folder has none."""
    try:
        known = json.loads((out / "snapshot.json").read_text(encoding="utf-8"))
        commit, dirty, digest = str(known["commit"]), bool(known["dirty"]), str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return describe_code(commit, dirty, digest)


def describe_code(commit: str, dirty: bool, digest: str) -> dict[str, str]:
    """Tags of a code snapshot; `mlflow.source.git.commit` is what MLflow's own pages show as the run's version."""
    shown = {"mlflow.source.git.commit": commit} if commit else {}
    return {"code.commit": commit, "code.dirty": str(dirty).lower(), "code.sha256": digest, **shown}


def job_tags() -> dict[str, str]:
    """Where this process runs: host, SLURM job, nodes, number of ranks, GPUs and driver. What does not apply is left out."""
    known = os.environ
    array, task = known.get("SLURM_ARRAY_JOB_ID"), known.get("SLURM_ARRAY_TASK_ID")
    found = {
        "job.host": socket.gethostname(),
        "job.slurm_id": f"{array}_{task}" if array and task else known.get("SLURM_JOB_ID", ""),
        "job.slurm_restarts": known.get("SLURM_RESTART_COUNT", ""),
        "job.nodes": known.get("SLURM_JOB_NODELIST", ""),
        "job.partition": known.get("SLURM_JOB_PARTITION", ""),
        "job.ranks": known.get("WORLD_SIZE", "1"),
        **_gpus(),
    }
    return {name: value for name, value in found.items() if value}


def version_tags() -> dict[str, str]:
    """Versions of Python and of the packages that a result can depend on."""
    found = {"versions.python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[f"versions.{name}"] = version(name)
        except PackageNotFoundError:
            continue
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested groups as dotted names, values as text: {"a": {"b": [1]}} to {"a.b": "[1]"}."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _gpus() -> dict[str, str]:
    """Names of this node's GPUs, `2 x NVIDIA H200`, and the driver; empty without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        names = [_text(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i))) for i in range(pynvml.nvmlDeviceGetCount())]
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return {}
    return {"job.gpu": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)), "versions.nvidia-driver": driver}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
