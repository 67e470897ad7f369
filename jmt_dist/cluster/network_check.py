"""Whether the nodes of a job find each other: names, interfaces, and, inside an allocation, a meeting of real ranks."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jmt_dist.cluster import site as sites
from jmt_dist.cluster.finding import Finding
from jmt_dist.config import Site

MEETING_SECONDS = 60
_OF_SLURM = re.compile(r"(srun|slurmstepd)[\w.-]*: ")  # a node's name follows where several slurmd share a machine
_INTERFACE = re.compile(r"\b(GLOO_SOCKET_IFNAME|NCCL_SOCKET_IFNAME)=[\"']?([^\s\"';]*)")


def names(site: Site) -> Iterator[Finding]:
    """Whether the partition's nodes, as SLURM calls them, can be found: the ranks of several nodes meet at the first one's name."""
    words = ["sinfo", "--noheader", "--Node", "--format", "%N", *(["--partition", site.partition] if site.partition else [])]
    if shutil.which("sinfo") is None:
        return
    found = sorted(set(subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.split()))
    lost = [name for name in found if not _resolves(name)]
    if not found:
        yield Finding("node names", "fail", f"sinfo shows no node of partition {site.partition or '(default)'}", "Mend site.partition.")
    elif lost and site.nodes > 1:
        remedy = "Add them to DNS or /etc/hosts. Jobs will use the address SLURM gives (SLURM_LAUNCH_NODE_IPADDR), which NCCL must reach."
        yield Finding("node names", "note", f"{len(lost)} of {len(found)} do not resolve, such as {lost[0]}", remedy)
    else:
        text = f"{len(found)} node(s)" + (f", {len(lost)} do not resolve: jobs of one node do not need it" if lost else ", all resolve")
        yield Finding("node names", "ok", text)


def _resolves(name: str) -> bool:
    try:
        socket.gethostbyname(name)
    except OSError:
        return False
    return True


def interfaces(site: Site) -> Iterator[Finding]:
    """Whether what the site's environment lines say of network interfaces can be meant: gloo takes plain names only."""
    chosen = [found for line in site.environment for found in _INTERFACE.findall(line) if "$" not in found[1]]
    for variable, value in chosen:
        if variable.startswith("GLOO") and not re.fullmatch(r"[\w.:\-]+(,[\w.:\-]+)*", value):
            remedy = "Name the interface itself; only NCCL reads ^ and prefixes."
            yield Finding("network interface", "fail", f"{variable}={value} in site.environment, which gloo does not understand", remedy)
    if site.nodes > 1 and not any(variable.startswith("NCCL") for variable, _ in chosen) and site.gpus_per_node:
        remedy = "Where nodes have several networks: export NCCL_SOCKET_IFNAME=<the fast one> in site.environment."
        yield Finding("network interface", "note", f"NCCL chooses by itself among {_own()}", remedy)


def _own() -> str:
    """This machine's interfaces and their addresses, but for loopback."""
    import psutil

    found = [
        f"{name} ({address.address})"
        for name, addresses in sorted(psutil.net_if_addrs().items())
        for address in addresses
        if address.family == socket.AF_INET and name != "lo"
    ]
    return ", ".join(found) or "no interface but loopback"


def meeting(site: Site, out: Path) -> Iterator[Finding]:
    """Inside an allocation of several nodes: one rank on each, with the site's environment lines, over a file in the run folder.

    Elsewhere a note that says how to have it tried, where the site's jobs have several nodes.
    """
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "0"))
    if nodes < 2 or shutil.which("srun") is None:
        if site.nodes > 1:
            queue = "".join(f" --{name}={value}" for name in ("partition", "account", "qos") if (value := getattr(site, name)))
            gpus = f" --gpus-per-node={site.gpus_per_node}" if site.gpus_per_node else ""
            words = f"salloc --nodes={site.nodes}{queue}{gpus} python launch/check_site.py site=… out={shlex.quote(str(out))}"
            yield Finding("meeting of nodes", "note", "not tried: this is no allocation of several nodes", f"Try it: {words}")
        return
    existing = next(path for path in (out, *out.parents) if path.exists())
    with tempfile.TemporaryDirectory(prefix=".jmt-check-", dir=existing) as folder:
        good, said = _meet(site, nodes, Path(folder))
    remedy = f"Let the nodes reach each other on ports {_ports()}, or name the network that does in site.environment: export "
    remedy += f"GLOO_SOCKET_IFNAME=… and NCCL_SOCKET_IFNAME=…; this machine has {_own()}."
    yield Finding("meeting of nodes", "ok" if good else "fail", said, "" if good else remedy)


def _ports() -> str:
    from jmt_dist.cluster.rendezvous import PORTS

    return f"{PORTS[0]} to {PORTS[-1]} and above"


def _meet(site: Site, nodes: int, folder: Path) -> tuple[bool, str]:
    import jmt_dist

    home = Path(jmt_dist.__file__ or "").resolve().parents[1]
    run = shlex.join([sites.python(), "-m", "jmt_dist.cluster.meet", str(folder), str(MEETING_SECONDS)])
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sites.job_environment(site, home).items()]
    script = "\n".join([*site.environment, *exports, "export SUBMITIT_EXECUTOR=slurm", f"exec {run}"])
    words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=1"]
    try:
        answer = subprocess.run([*words, "bash", "-c", script], capture_output=True, text=True, timeout=4 * MEETING_SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"{nodes} nodes did not meet within {4 * MEETING_SECONDS} s"
    if answer.returncode == 0:
        return True, answer.stdout.strip().splitlines()[-1]
    lines = [line for line in answer.stderr.splitlines() if line.strip() and not _OF_SLURM.match(line)]
    return False, lines[-1][:300] if lines else answer.stderr.strip()[-300:]
