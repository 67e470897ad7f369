"""Runs a function in several real gloo processes with a file rendezvous; failures come back with their traceback."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=120))
        torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
        sys.exit(1)


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on `world` ranks; returns what each rank returned. The function must be importable."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [context.Process(target=_enter, args=(rank, world, folder, function, arguments)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        if errors or alive or any(process.exitcode for process in processes):
            raise AssertionError("\n".join(errors) or f"ranks hung or died: {[process.exitcode for process in processes]}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]
