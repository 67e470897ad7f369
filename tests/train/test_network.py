"""How ranks of several nodes find each other: the interface by name, agreement over the hosts, GPUs by number."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from jmt_dist.errors import UserError
from jmt_dist.train import network, ranks
from tests.ranks import run_ranks


def outward() -> tuple[str, str]:
    """(name, address) of the interface that holds this machine's default route, as the kernel's table has it."""
    rows = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    name = next((row[0] for row in rows if row[1] == "00000000" and int(row[3], 16) & 2), "")
    if not name:
        pytest.skip("this machine has no default route: there is no interface to other machines")
    return name, next(entry.address for entry in psutil.net_if_addrs()[name] if entry.family == socket.AF_INET)


def chosen(patch: pytest.MonkeyPatch, own: str, master: str) -> str:
    """What is chosen on a node whose name stands for the address `own`, and whose first rank is at `master`."""
    resolve = socket.getaddrinfo
    patch.setattr(socket, "gethostname", lambda: "me")
    patch.setattr(socket, "gethostbyname", lambda name: {"me": own}[name])
    # the first rank's name, too, stands for a loopback address where it is looked up by itself
    patch.setattr(socket, "getaddrinfo", lambda host, *more, **named: resolve(own if host == "me" else host, *more, **named))
    patch.setenv("GLOO_SOCKET_IFNAME", "")
    patch.setenv("MASTER_ADDR", master)
    network.choose_interface()
    return os.environ["GLOO_SOCKET_IFNAME"]


def test_gloo_gets_an_interface_where_it_would_listen_at_a_loopback_address_by_itself() -> None:
    name, address = outward()
    for own, master, wanted in (
        ("127.0.1.1", "127.0.0.1", "lo"),  # ranks of one node
        ("127.0.1.1", "198.51.100.9", name),  # the way to another one's first rank
        ("127.0.1.1", "me", name),  # this is the first rank: the way out
        ("127.0.1.1", address, name),
        (address, "198.51.100.9", ""),  # gloo listens where the name says
    ):
        with pytest.MonkeyPatch.context() as patch:
            assert chosen(patch, own, master) == wanted, (own, master)
    assert network.interface_to("no-such-machine.invalid") == "" == network.interface_to(address)


def test_an_interface_that_is_named_stays_and_one_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    network.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib7")
    with pytest.raises(UserError, match=r"no network interface ib7 \(it has .*lo.*every node has"):
        network.choose_interface()


def joined(rank: int, host: str, port: int) -> tuple[str, list[str], float]:
    """A job of its own, met at an address of this machine: (interface, addresses gloo listens at, a sum over ranks)."""
    dist.destroy_process_group()
    del os.environ["GLOO_SOCKET_IFNAME"]
    before = _listening()
    socket.gethostname = lambda: "localhost"  # as where a system writes its own name beside it
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    ranks.start(torch.device("cpu"))
    total = float(ranks.sum_over_ranks(torch.tensor(1.0 + rank)))
    ranks.barrier()
    return os.environ["GLOO_SOCKET_IFNAME"], sorted(_listening() - before), total


def _listening() -> set[str]:
    """Addresses, without ports, at which this process waits for connections; of rank 0 also that of the meeting place."""
    return {found.laddr.ip for found in psutil.Process().net_connections("tcp") if found.status == psutil.CONN_LISTEN}


def test_ranks_that_meet_at_an_address_of_a_network_listen_there_and_not_at_the_loopback() -> None:
    name, address = outward()
    for interface, listening, total in run_ranks(2, joined, address, ranks._free_port()):
        assert interface == name and total == 3.0
        assert address in listening and not {place for place in listening if place.startswith("127.")}, listening


def agreed(rank: int) -> list[object]:
    """What ranks of a job of GPUs agree on: its own group must not be used for it."""
    world, calls = dist.group.WORLD, []
    original = {name: getattr(dist, name) for name in ("all_reduce", "broadcast_object_list", "all_gather_object", "barrier")}

    def watched(name: str) -> object:
        def call(*arguments: Any, group: Any = None, **named: Any) -> Any:
            calls.append((name, group is not None and group is not world and dist.get_backend(group)))
            return original[name](*arguments, group=group, **named)

        return call

    backend = dist.get_backend
    dist.get_backend = lambda group=None: "nccl" if group is None else backend(group)
    for name in original:
        setattr(dist, name, watched(name))
    gpu = torch.device("cuda", rank)
    ranks.barrier()
    found = [ranks.any_rank(rank == 1, gpu), ranks.any_rank(False, gpu), ranks.from_first(f"of {rank}"), ranks.first_word("x" * rank)]
    return [*found, sorted(set(calls))]


def test_ranks_of_gpus_agree_over_gloo_on_the_hosts() -> None:
    over = [(name, "gloo") for name in ("all_gather_object", "all_reduce", "barrier", "broadcast_object_list")]
    assert run_ranks(2, agreed) == [[True, False, "of 0", "x", over]] * 2


def test_a_rank_that_does_not_see_the_gpu_of_its_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"rank 1 of this node sees 1 GPU, .*--gpus-per-task"):
        ranks.choose_device("auto")
