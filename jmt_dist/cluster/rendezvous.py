"""Where the ranks of a job meet: rank 0 chooses a port that is its own, and tells the others through the run folder.

A port made from the job's number, as is usual, may be taken: by a job of another number, or by any program. Here rank 0 looks for a
free one and keeps a lock on its number while it lives, so that two jobs of a user on one node never choose the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from jmt_dist.cluster.status import read_json, write_json
from jmt_dist.errors import UserError

PORTS = range(20000, 32000)  # below those that systems hand out by themselves
FILE = "rendezvous.json"
_kept: list[IO[bytes]] = []  # locks of ports, for the life of this process


def reserve_port(ports: range = PORTS) -> int:
    """A free TCP port of this machine, reserved against other jobs of this user while this process lives."""
    folder = Path(tempfile.gettempdir()) / f"jmt-ports-{os.geteuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    for port in random.SystemRandom().sample(ports, len(ports)):
        lock = _lock(folder / str(port))
        if lock is None:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                lock.close()
                continue
        _kept.append(lock)
        return port
    raise UserError(f"there is no free port between {ports[0]} and {ports[-1]} on {socket.gethostname()}", "End what holds them.")


def _lock(path: Path) -> IO[bytes] | None:
    lock: IO[bytes] | None = None
    try:
        lock = path.open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except OSError:
        if lock is not None:
            lock.close()
        return None


def address(name: str, several_nodes: bool) -> str:
    """Rank 0's address for the others. Raises UserError where the nodes' names do not resolve and SLURM knows no address.

    On one node it is the loopback address: a machine whose own name does not resolve can still train.
    """
    if not several_nodes:
        return "127.0.0.1"
    with contextlib.suppress(OSError):
        socket.gethostbyname(name)
        return name
    launcher = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")  # srun runs on the job's first node, which is rank 0's
    if not launcher:
        raise UserError(f"the node name {name} does not resolve", "Add it to DNS or /etc/hosts of the nodes, or use site.nodes=1.")
    return launcher


def choose_interface(nodes: Sequence[str]) -> None:
    """Set GLOO_SOCKET_IFNAME where gloo would listen on an interface that the job's other nodes cannot reach; a value that is set stays.

    gloo listens at the address of this machine's own name, and at the loopback address where that is none or does not resolve. On one
    node loopback is what is wanted. On several it is not, and many systems map their own name to 127.0.1.1: there the interface is
    the one by which this node reaches another of the job. NCCL chooses by itself, and never loopback between nodes.
    """
    from jmt_dist.train.network import interface_to

    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    if len(nodes) < 2:
        if "lo" in (name for _, name in socket.if_nameindex()):
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        return
    try:
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return
    except OSError:
        pass
    found = next(filter(None, map(interface_to, nodes)), "")
    if found:
        os.environ["GLOO_SOCKET_IFNAME"] = found


def publish(folder: Path, start: str, host: str) -> None:
    """Rank 0: choose a port, set MASTER_ADDR and MASTER_PORT, and tell the ranks of this start."""
    port = reserve_port()
    write_json(folder / FILE, {"start": start, "host": host, "port": port})
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))


def await_port(folder: Path, start: str, stopped: Callable[[], None]) -> None:
    """The other ranks: wait for rank 0 of this start, however long it waits itself; `stopped` may raise to end the wait."""
    while True:
        found = read_json(folder / FILE)
        if found.get("start") == start:
            os.environ.update(MASTER_ADDR=str(found["host"]), MASTER_PORT=str(found["port"]))
            return
        stopped()
        time.sleep(0.1)
