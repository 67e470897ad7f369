"""Ports of jobs on one node, and how ranks learn them."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jmt_dist.cluster import rendezvous
from jmt_dist.errors import UserError
from tests.cluster.conftest import ROOT

HOLD = """
import sys
from jmt_dist.cluster.rendezvous import reserve_port
print(reserve_port(range(int(sys.argv[1]), int(sys.argv[1]) + 3)), flush=True)
sys.stdin.read()
"""


def free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for first in range(21000, 31000, count):
        held = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(held):
                probe.bind(("", first + offset))
            return first
        except OSError:
            continue
        finally:
            for probe in held:
                probe.close()
    raise AssertionError("no free ports")


def test_jobs_of_one_node_never_choose_the_same_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    first = free_ports(3)
    with socket.socket() as other:  # another program's
        other.bind(("", first))
        command = [sys.executable, "-c", HOLD, str(first)]
        jobs = [subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert {int(job.stdout.readline()) for job in jobs} == {first + 1, first + 2}  # none of them listens yet
        with pytest.raises(UserError, match="there is no free port between"):
            rendezvous.reserve_port(range(first, first + 3))
        jobs[0].kill()
        jobs[0].communicate()
        assert rendezvous.reserve_port(range(first, first + 3)) in (first + 1, first + 2)  # a dead job's port is free again
        jobs[1].communicate()


def test_ranks_take_the_port_of_their_own_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    rendezvous.publish(tmp_path, "start 1", "127.0.0.1")
    looks = []

    def stopped() -> None:
        looks.append(1)
        if len(looks) == 3:
            threading.Thread(target=rendezvous.publish, args=(tmp_path, "start 2", "n7")).start()

    import os

    rendezvous.await_port(tmp_path, "start 2", stopped)
    assert len(looks) >= 3 and os.environ["MASTER_ADDR"] == "n7"


def test_the_address_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a-node-that-is-nowhere.invalid"
    monkeypatch.delenv("SLURM_LAUNCH_NODE_IPADDR", raising=False)
    assert rendezvous.address(name, several_nodes=False) == "127.0.0.1"
    assert rendezvous.address("localhost", several_nodes=True) == "localhost"
    with pytest.raises(UserError, match="does not resolve"):
        rendezvous.address(name, several_nodes=True)
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.7")
    assert rendezvous.address(name, several_nodes=True) == "10.0.0.7"
