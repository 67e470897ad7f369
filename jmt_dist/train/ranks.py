"""Ranks of a job: helpers that work the same with and without a process group (one process is the ordinary case)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jmt_dist.errors import UserError
from jmt_dist.train.network import choose_interface

LIMIT = timedelta(minutes=30)  # of one collective; what may take longer is done `apart`
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


_hosts: Any = None


def _over_hosts() -> Any:
    """The group over which ranks agree: gloo, on tensors of the host. Collective where it is made.

    None, the job's own group, where that is gloo itself. In a job of GPUs it is another one: NCCL would wait for all that the GPU
    still has to do.
    """
    global _hosts
    if _hosts is None and dist.get_backend() != "gloo":
        _hosts = dist.new_group(backend="gloo", timeout=LIMIT)
    return _hosts


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        dist.barrier(group=_over_hosts())


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks, outside autograd."""
    if world() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank where it is true on one: ranks agree before they act. Collective."""
    if world() == 1:
        return flag
    value = torch.tensor(float(flag))
    dist.all_reduce(value, group=_over_hosts())
    return bool(value > 0)


def from_first(value: Any) -> Any:
    """Rank 0's picklable object on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_over_hosts())
    return box[0]


def first_word(own: str) -> str:
    """The text of the first rank that has one, on every rank; empty where none has. Collective."""
    if world() == 1:
        return own
    return next((text for text in _everywhere(own) if text), "")


_parts = 0


def apart(work: Callable[[Callable[[], None]], None] | None, moved: Callable[[str], None]) -> None:
    """Some ranks do `work`, which may take longer than a collective may; the others (None) wait for it outside of one. Collective.

    A worker calls what it is given whenever it has got on. The ranks that wait look at that, at most twice a second, in the job's store and
    hand it to their own `moved(where)`: where nobody gets on any more, nobody moves. Raises what `work` raises.
    """
    global _parts
    _parts += 1
    key = f"jmt-apart-{_parts}"  # as many calls on every rank
    workers = [number for number in _everywhere(rank() if work is not None else -1) if number >= 0]
    store: Any = dist.distributed_c10d._get_default_store() if world() > 1 else None
    if work is not None:
        work(_Sign(store, f"{key}-{rank()}", moved))
    if store is None:
        return
    if work is not None:
        store.add(f"{key}-done", 1)
    seen: list[int] = []
    pause = 0.01  # work that is short is not waited for longer than it takes
    while store.add(f"{key}-done", 0) < len(workers):
        signs = [int(store.add(f"{key}-{number}", 0)) for number in workers]
        if signs != seen:
            seen = signs
            moved(f"waiting for rank{'s' * (len(workers) > 1)} {', '.join(map(str, workers))}")
        time.sleep(pause)
        pause = min(0.5, 2 * pause)
    barrier()  # the first rank holds the store, and may be about to end


class _Sign:
    """A sign that its rank gets on: to its own watch each time, to the other ranks once a second at most."""

    def __init__(self, store: Any, key: str, moved: Callable[[str], None]) -> None:
        self._store, self._key, self._moved, self._next = store, key, moved, 0.0

    def __call__(self) -> None:
        self._moved("")
        if self._store is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + 1
            self._store.add(self._key, 1)


def _everywhere(own: Any) -> list[Any]:
    """Every rank's picklable object, by rank, on every rank."""
    found: list[Any] = [own] * world()
    if world() > 1:
        dist.all_gather_object(found, own, group=_over_hosts())
    return found


def choose_device(name: str) -> torch.device:
    """The device of this rank: `auto`, `cpu` or `cuda`."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("site.device=cuda, but torch finds no GPU here", "Use site.device=auto, or ask the scheduler for GPUs.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= there:  # NCCL refuses two ranks on one GPU, and DeepSpeed takes LOCAL_RANK for the number of its GPU
        raise UserError(
            f"rank {index} of this node sees {there} GPU{'s' * (there > 1)}, and needs the one of its own number",
            "Use one rank per GPU, and let each see all GPUs of its node (no --gpus-per-task, no --gpu-bind); or site.device=cpu.",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def start(device: torch.device) -> None:
    """Join the job's process group through DeepSpeed, quietly and without compiling an op.

    All of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT must be set: with one of them missing DeepSpeed would look
    for MPI. A single process that has none of them becomes a world of one.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if len(missing) == len(VARIABLES):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    elif missing:
        raise UserError(f"the environment sets some of {', '.join(VARIABLES)} but not {', '.join(missing)}", "Set all of them or none.")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.environ["WORLD_SIZE"] != "1":
        choose_interface()
    import setuptools  # noqa: F401 before DeepSpeed: otherwise torch warns of distutils

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import set_log_level_from_string

    set_log_level_from_string("error")
    if device.type == "cpu":
        # used by inference_all_reduce only; building it would need a compiler and takes a minute (measured: 54 s)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False, timeout=LIMIT)


def leave() -> None:
    """Leave the process group, if any."""
    global _hosts
    _hosts = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
