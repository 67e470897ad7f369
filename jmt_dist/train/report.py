"""What a fold says of itself while it runs: status.json for people, one line per event for the log."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jmt_dist.train.ranks import rank
from jmt_dist.train.stage import write_json

EVERY = 1.0  # seconds between writes of status.json within a stage
LINES = 10.0  # seconds between lines in the log


def now() -> str:
    """The time as ISO 8601 with milliseconds, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Status:
    """Keeps `<fold>/status.json` up to date on rank 0; other ranks' calls do nothing. Fields it does not know stay."""

    def __init__(self, folder: Path, fold: str) -> None:
        self.path, self.fold = folder / "status.json", fold
        self._written, self._printed, self._stage = 0.0, 0.0, ""

    def set(self, **changes: Any) -> None:
        """Change fields at once."""
        if rank() != 0:
            return
        try:
            known = json.loads(self.path.read_text())
        except (OSError, json.JSONDecodeError):
            known = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**known, "fold": self.fold, **changes, "update": now()})
        self._written = time.monotonic()

    def failed(self, reason: str, again: bool) -> None:
        """Note why this rank ends itself, where whoever outlives the ranks looks for it (cluster.attempts), and what people see."""
        errors = self.path.parent / "errors"
        errors.mkdir(exist_ok=True)
        write_json(errors / f"{rank()}.json", {"time": time.time(), "reason": reason, "again": again})
        self.set(state="failed", reason=reason)

    def progress(self, **values: Any) -> None:
        """Stage, epoch, step, steps, best score and hours left: written at most once a second, printed every ten."""
        if rank() != 0:
            return
        clock, fresh = time.monotonic(), values["stage"] != self._stage
        self._stage = values["stage"]
        complete = values["step"] == values["steps"]
        if fresh or complete or clock - self._written > EVERY:
            with contextlib.suppress(OSError):  # a full disk: training goes on, as it does without a checkpoint
                self.set(state="running", **values)
        if fresh or complete or clock - self._printed > LINES:
            score = "" if values["score"] is None else f", best score {values['score']:.3f}"
            print(f"{self.fold} {values['stage']}: epoch {values['epoch']}, step {values['step']}/{values['steps']}{score}", flush=True)
            self._printed = clock
