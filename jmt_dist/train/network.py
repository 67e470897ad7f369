"""By which network interface the ranks of a job reach each other over gloo."""

from __future__ import annotations

import os
import socket

from jmt_dist.errors import UserError

VARIABLE = "GLOO_SOCKET_IFNAME"
ELSEWHERE = "192.0.2.1"  # an address of no machine (RFC 5737): the way to it is the way out of this node


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME where gloo would listen at a loopback address though MASTER_ADDR is none; a value that is set stays.

    gloo listens at the address that the node's own name stands for: on many systems 127.0.1.1, where ranks of other nodes look for it
    in vain. A scheduler's job has chosen before, knowing all its nodes; this is for ranks that torchrun or a person has started.
    Raises UserError where the variable names an interface that this node does not have.
    """
    own = _interfaces()
    named = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    missing = [name for name in named if name not in own.values()]
    if missing:
        raise UserError(
            f"{VARIABLE}={','.join(named)}, but {socket.gethostname()} has no network interface {missing[0]}"
            f" (it has {', '.join(sorted(set(own.values())))})",
            "Name one that every node has, in site.environment, or leave it unset.",
        )
    master = os.environ["MASTER_ADDR"]
    if named or not _loopback(socket.gethostname()):
        return
    # the first rank's own name may be a loopback address, too: the others are on the way out, as far as it can know
    found = own.get("127.0.0.1", "") if master in ("localhost", "127.0.0.1") else interface_to(master) or interface_to(ELSEWHERE)
    if found:
        os.environ[VARIABLE] = found


def interface_to(host: str) -> str:
    """The network interface by which this machine reaches another; empty where that does not resolve, or is this machine."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            source = str(probe.getsockname()[0])
    except OSError:
        return ""
    return "" if source == address[0] or source.startswith("127.") else _interfaces().get(source, "")


def _loopback(host: str) -> bool:
    """Whether a name stands for a loopback address, or for none."""
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return True


def _interfaces() -> dict[str, str]:
    """Names of this machine's interfaces by address."""
    import psutil

    return {entry.address.partition("%")[0]: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
