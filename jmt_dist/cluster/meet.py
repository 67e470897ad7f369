"""Whether ranks on several nodes find each other, tried as a job does it: what `check_site.py` starts by srun, one rank per node.

Called as `python -m jmt_dist.cluster.meet <folder of the run folder's file system> <seconds>`.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from jmt_dist.cluster import rendezvous
from jmt_dist.cluster.job import export_ranks, node
from jmt_dist.errors import UserError


def main(words: list[str]) -> int:
    """Meet the other ranks and add a number with them, over gloo and, where there are GPUs, NCCL; rank 0 says how it went.

    Raises UserError where a rank does not see what rank 0 has written within the time, and RuntimeError of torch where they cannot talk.
    """
    folder, seconds = Path(words[0]), float(words[1])
    environment = export_ranks()
    rank, world = environment.global_rank, environment.num_tasks
    if rank == 0:
        rendezvous.publish(folder, "check", rendezvous.address(environment.hostnames[0], environment.num_nodes > 1))
    else:
        end = time.monotonic() + seconds

        def give_up() -> None:
            if time.monotonic() > end:
                remedy = "The run folder must be on a file system that all nodes share under one path."
                raise UserError(f"{node()} does not see what {environment.hostnames[0]} has written to {folder}", remedy)

        rendezvous.await_port(folder, "check", give_up)
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    found = [f"gloo on {os.environ.get('GLOO_SOCKET_IFNAME') or 'the address of the host name'}: {_milliseconds(torch.ones(1)):.1f} ms"]
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank % torch.cuda.device_count())
        group = dist.new_group(backend="nccl", timeout=timedelta(seconds=seconds))
        found.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}: {_milliseconds(torch.ones(1, device='cuda'), group):.1f} ms")
    dist.barrier()
    if rank == 0:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(f"{world} ranks on {environment.num_nodes} node(s) met at {place}; {', '.join(found)} for a sum", flush=True)
    dist.destroy_process_group()
    return 0


def _milliseconds(value: Any, group: Any = None) -> float:
    """A sum over the ranks once connections are made. Raises RuntimeError where it is wrong."""
    import torch.distributed as dist

    for _ in range(2):
        total = value.clone()
        began = time.perf_counter()
        dist.all_reduce(total, group=group)
        if total.item() != dist.get_world_size():
            raise RuntimeError(f"{dist.get_world_size()} ones add up to {total.item()}")
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
