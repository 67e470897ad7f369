"""Nodes that must find each other: interfaces, and a meeting of real ranks, in network namespaces and inside an allocation of SLURM."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jmt_dist.cluster import network_check, rendezvous
from jmt_dist.config import Site
from jmt_dist.train import network
from tests.cluster.conftest import ROOT

NODES = ("10.77.3.1", "10.77.3.2")
SPACES = ("jmt-test-1", "jmt-test-2")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # undone at the end, whatever the code under test sets
    yield monkeypatch


def chosen(nodes: list[str]) -> str:
    os.environ["GLOO_SOCKET_IFNAME"] = ""
    rendezvous.choose_interface(nodes)
    return os.environ["GLOO_SOCKET_IFNAME"]


def test_gloo_gets_an_interface_only_where_it_would_take_a_wrong_one(environment: pytest.MonkeyPatch) -> None:
    addresses = {"me": "127.0.1.1", "n2": "192.0.2.7"}
    environment.setattr(socket, "gethostname", lambda: "me")
    environment.setattr(socket, "gethostbyname", lambda name: addresses[name])
    environment.setattr(network, "interface_to", lambda node: {"n2": "ib0"}.get(node, ""))
    assert chosen(["me"]) == "lo"
    assert chosen(["me", "n2"]) == "ib0"  # this name is the loopback address, as on many systems
    addresses["me"] = "192.0.2.6"
    assert chosen(["me", "n2"]) == ""  # gloo listens where the name says
    environment.setattr(socket, "gethostbyname", lambda name: (_ for _ in ()).throw(OSError("no such name")))
    assert chosen(["me", "n2"]) == "ib0" and chosen(["me", "n3"]) == ""
    os.environ["GLOO_SOCKET_IFNAME"] = "eth7"
    rendezvous.choose_interface(["me", "n2"])
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_interfaces_that_gloo_cannot_read_are_refused_and_missing_ones_are_named() -> None:
    good = Site(executor="slurm", nodes=2, gpus_per_node=4, environment=["export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=^lo,docker"])
    assert list(network_check.interfaces(good)) == []
    wrong = good.model_copy(update={"environment": ["export GLOO_SOCKET_IFNAME='^lo'"]})
    found = list(network_check.interfaces(wrong))
    assert [finding.outcome for finding in found] == ["fail", "note"] and all(finding.remedy for finding in found)
    assert "GLOO_SOCKET_IFNAME=^lo in site.environment" in found[0].found


@pytest.fixture
def spaces() -> Iterator[None]:
    """Two network namespaces joined by a cable: as many machines, as far as the network goes, whose own name is a loopback address."""
    allowed = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"this machine makes no network namespaces: {allowed.stderr.strip()}")
    for number, space in enumerate(SPACES):
        subprocess.run(["ip", "netns", "add", space], check=True)
        subprocess.run(["ip", "-n", space, "link", "set", "lo", "up"], check=True)
        if number:
            subprocess.run(
                ["ip", "link", "add", "cable1", "netns", SPACES[0], "type", "veth", "peer", "name", "cable2", "netns", space], check=True
            )
    for number, space in enumerate(SPACES):
        subprocess.run(["ip", "-n", space, "address", "add", f"{NODES[number]}/24", "dev", f"cable{number + 1}"], check=True)
        subprocess.run(["ip", "-n", space, "link", "set", f"cable{number + 1}", "up"], check=True)
    yield
    for space in SPACES:
        subprocess.run(["ip", "netns", "delete", space])


@pytest.mark.slurm
def test_ranks_meet_across_a_network(spaces: None, tmp_path: Path) -> None:
    ranks = []
    for number, space in enumerate(SPACES):
        slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": ",".join(NODES)}
        slurm |= {"SLURM_PROCID": str(number), "SLURM_LOCALID": "0", "SLURM_NODEID": str(number), "SUBMITIT_EXECUTOR": "slurm"}
        plain = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
        command = ["ip", "netns", "exec", space, sys.executable, "-m", "jmt_dist.cluster.meet", str(tmp_path), "60"]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=plain | slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    texts = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], texts
    # by itself gloo would listen at the loopback address, where the other rank finds nobody
    assert f"2 ranks on 2 node(s) met at {NODES[0]}:" in texts[0] and "gloo on cable1" in texts[0]
    assert json.loads((tmp_path / rendezvous.FILE).read_text())["host"] == NODES[0]


@pytest.mark.slurm
def test_check_site_lets_ranks_meet_inside_an_allocation(cluster: Path, tmp_path: Path) -> None:
    code = "\n".join([
        "import sys",
        "from pathlib import Path",
        "from jmt_dist.cluster.network_check import meeting",
        "from jmt_dist.config import Site",
        "lines = sys.argv[2:]",
        "site = Site(executor='slurm', partition='mini', nodes=2, environment=lines)",
        "for finding in meeting(site, Path(sys.argv[1]) / 'not made yet'): print(finding.line())",
    ])  # fmt: skip
    allocate = ["salloc", "--quiet", "--partition=mini", "--nodes=2", sys.executable, "-c", code, str(tmp_path)]
    answer = subprocess.run(allocate, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert answer.stdout.startswith("ok    meeting of nodes: 2 ranks on 2 node(s) met at "), answer.stdout + answer.stderr
    answer = subprocess.run([*allocate, "export GLOO_SOCKET_IFNAME=no-such-0"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert answer.stdout.startswith("FAIL  meeting of nodes: ") and "no-such-0" in answer.stdout, answer.stdout + answer.stderr
    assert " -> Let the nodes reach each other on ports 20000 to 31999" in answer.stdout and not list(tmp_path.iterdir())
    alone = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True).stdout
    assert (
        alone.startswith("note  meeting of nodes: not tried") and "salloc --nodes=2 --partition=mini python launch/check_site.py" in alone
    )
