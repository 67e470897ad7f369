"""Runs a function in several real processes (gloo, or NCCL) with a file rendezvous; failures come back with their traceback.

The processes are forked from one that has imported what they need: importing takes longer than most of what they do.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 240  # seconds until a rank counts as hanging
PRELOAD = ["setuptools", "deepspeed", "nvidia.dali.plugin.pytorch", "jmt_dist.train.fold", "tests.ranks"]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def server() -> Any:
    """The context of processes that have everything imported."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    kept = dict(os.environ)
    os.environ.update(ENVIRONMENT)  # the server needs them from its start: OpenMP's threads do not survive a fork
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return context


def _enter(rank: int, world: int, folder: str, device: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    os.environ.update(ENVIRONMENT | {"DS_ACCELERATOR": device})
    torch.set_num_threads(1)
    try:
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=120))
        torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
        sys.exit(1)


def start_ranks(world: int, folder: str, function: Callable[..., Any], *arguments: Any, device: str = "cpu") -> list[int | None]:
    """`function(rank, *arguments)` on `world` ranks, for tests of how they end; returns their exit codes, of a hanging one -9."""
    context = server() if device == "cpu" else mp.get_context("spawn")  # CUDA and DeepSpeed's accelerator do not outlive a fork
    processes = [context.Process(target=_enter, args=(rank, world, folder, device, function, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, device: str = "cpu") -> list[Any]:
    """`function(rank, *arguments)` on `world` ranks; returns what each rank returned. The function must be importable.

    DeepSpeed chooses its accelerator once per process: `device` ("cpu" or "cuda") is that of all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = start_ranks(world, folder, function, *arguments, device=device)
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        if errors or any(codes):
            raise AssertionError("\n".join(errors) or f"ranks hung or died: {codes}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]
