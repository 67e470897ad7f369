"""A request to stop: signal handlers set it, the training loop acts on it once all ranks agree (DESIGN section 11)."""

from __future__ import annotations

_reason = ""


class Stopped(Exception):  # noqa: N818 not an error: training was asked to stop and has saved its state
    """Training stopped at a request, after every rank had saved; the same job can go on later."""

    tracking_state = "SCHEDULED"  # what MLflow is told of such a run


def request(reason: str) -> None:
    """Ask the training loop to save and stop. Safe inside a signal handler: it only sets a variable."""
    global _reason
    _reason = _reason or reason


def requested() -> str:
    """The reason of the first request, or an empty string."""
    return _reason


def clear() -> None:
    """Forget the request (a process that runs several jobs)."""
    global _reason
    _reason = ""
