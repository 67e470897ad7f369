"""The small JSON files of a run folder that say how its folds are doing.

`<out>/<fold>/status.json` is written by rank 0 of the fold (and by the scheduler once the fold's processes are gone);
`<out>/jobs.json` by whoever submits. Every write is one atomic rename, so a reader never sees half a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

STATES = ("waiting", "running", "done", "failed", "stopped")


def now() -> str:
    """The time as ISO 8601 with milliseconds, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is missing or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object so that readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_status(out: Path, fold: str) -> dict[str, Any]:
    """A fold's status.json; empty before its job has started."""
    return read_json(out / fold / "status.json")


def update_status(out: Path, fold: str, **changes: Any) -> None:
    """Change fields of a fold's status.json; the others stay."""
    write_json(out / fold / "status.json", {"fold": fold, **read_status(out, fold), **changes, "update": now()})


def is_done(out: Path, fold: str, work: str) -> bool:
    """Whether a fold is finished for this work (hash of recipe and shards)."""
    status = read_status(out, fold)
    return status.get("state") == "done" and status.get("work") == work


@dataclass(frozen=True)
class Row:
    """One fold as `show_status.py` prints it."""

    fold: str
    state: str
    stage: str
    epoch: str
    step: str
    score: str
    starts: str
    job: str
    node: str
    heartbeat: str
    log: str
    reason: str


class Known(Protocol):
    """What a scheduler says of a job."""

    @property
    def state(self) -> str:
        """PENDING, RUNNING, …"""

    @property
    def reason(self) -> str:
        """Why it waits; may be empty."""

    @property
    def nodes(self) -> str:
        """Where it runs; may be empty."""


def row(out: Path, fold: str, jobs: Mapping[str, Any], alive: Mapping[str, Known] | None = None, label: str = "") -> Row:
    """A fold's row from its status.json, its lease and its entry in jobs.json.

    `alive` maps folds to what the scheduler says (empty: it no longer knows them); a fold that says `running` while its job is
    gone is shown as `lost`. None: not asked. The heartbeat is the age of the newer of lease and status.
    """
    status = read_status(out, fold)
    entry: Mapping[str, Any] = next((job for job in jobs.get("jobs", []) if job.get("fold") == fold), {})
    state, reason = str(status.get("state", "waiting")), str(status.get("reason") or "")
    node = str(status.get("node") or "")
    if alive is not None and entry and state in ("running", "waiting", "stopped"):
        known = alive.get(fold)
        if known is None:
            state = state if state == "stopped" else "lost"
        else:  # a fold that was stopped and is in the queue goes on
            state = state if state == "running" else known.state.lower()
            node, waits = known.nodes or (node if state == "running" else ""), known.reason if known.state == "PENDING" else ""
            reason = "; ".join(dict.fromkeys(filter(None, [reason, waits])))
    score = status.get("score")
    step, steps = status.get("step"), status.get("steps")
    times = [str(read_json(out / fold / "lease.json").get("time") or ""), str(status.get("update") or "")]
    return Row(
        fold=label or fold,
        state=state,
        stage=str(status.get("stage") or ""),
        epoch=_text(status.get("epoch")),
        step=f"{step}/{steps}" if step is not None and steps else _text(step),
        score=f"{score:.3f}" if isinstance(score, int | float) else "",
        starts=_text(status.get("try")),
        job=str(entry.get("job") or status.get("job") or ""),
        node=node,
        heartbeat=_ago(max(times)) if state in ("running", "lost", "completing") else "",
        log=str(entry.get("log") or ""),
        reason=reason,
    )


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 400 * count))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:] if count else []


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _ago(time: str) -> str:
    try:
        gone = int((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())
    except (ValueError, TypeError):
        return ""
    if gone < 120:
        return f"{max(0, gone)} s ago"
    return f"{gone // 60} min ago" if gone < 7200 else f"{gone // 3600} h ago"
