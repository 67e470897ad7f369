"""By which network interface the ranks of a job reach each other over gloo."""

from __future__ import annotations

import os
import socket

from jmt_dist.errors import UserError

VARIABLE = "GLOO_SOCKET_IFNAME"
ELSEWHERE = "192.0.2.1"  # an address of no machine (RFC 5737): the way to it is the way out of this node


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME to the interface on the way to MASTER_ADDR, unless it is set.

    Left alone, gloo takes the address that the node's own name resolves to: on many systems 127.0.1.1, where ranks of other nodes
    look for it in vain. Raises UserError where the variable names an interface that this node does not have.
    """
    own = _interfaces()
    named = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    missing = [name for name in named if name not in own.values()]
    if missing:
        there = ", ".join(sorted(set(own.values())))
        raise UserError(
            f"{VARIABLE}={','.join(named)}, but {socket.gethostname()} has no network interface {missing[0]} (it has {there})",
            "Name one that every node has, in site.environment, or leave it unset.",
        )
    found = "" if named else interface_to(os.environ["MASTER_ADDR"], own)
    if found:
        os.environ[VARIABLE] = found


def interface_to(host: str, own: dict[str, str] | None = None) -> str:
    """The name of the interface by which this node sends to `host`; empty where that cannot be told.

    A name of this very node that resolves to 127.0.1.1 is no way to other nodes: then it is the interface on the way out.
    `own`: interfaces by address.
    """
    own = _interfaces() if own is None else own
    source = _source(host)
    if source.startswith("127.") and host not in ("localhost", "127.0.0.1"):
        source = _source(ELSEWHERE) or source
    return own.get(source, "")


def _source(host: str) -> str:
    """The address from which this node would send to `host`; nothing is sent."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _interfaces() -> dict[str, str]:
    import psutil

    return {entry.address.partition("%")[0]: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
