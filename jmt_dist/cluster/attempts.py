"""The starts of a fold job: `<out>/<fold>/attempts.json`, and what is to be done when one of them has ended.

Rank 0 opens an attempt and closes it when the fold is done or stopped. A crash is closed by whoever outlives the ranks: the
local scheduler, or the last lines of the batch script. They never write at the same time, so no lock is needed.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jmt_dist.cluster.status import now, read_json, update_status, write_json
from jmt_dist.errors import UserError

# what gloo, NCCL and torch's store say in a rank whose companion has died: an effect, not the reason
_LOST_PEER = re.compile(r"connection (was likely )?(closed|reset)|remote process exited|broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class Start:
    """What one start of a fold job is known by: `restart` tells the starts of one SLURM job apart."""

    submission: str
    job: str
    restart: int = 0

    def matches(self, entry: dict[str, Any]) -> bool:
        """Whether an entry of attempts.json is this start."""
        return (entry.get("submission"), entry.get("job"), entry.get("restart")) == (self.submission, self.job, self.restart)


@dataclass(frozen=True)
class Verdict:
    """What follows from the end of an attempt."""

    next: Literal["done", "again", "failed"]
    reason: str


def read_attempts(out: Path, fold: str) -> list[dict[str, Any]]:
    """All starts of a fold, oldest first."""
    entries = read_json(out / fold / "attempts.json").get("attempts", [])
    return entries if isinstance(entries, list) else []


def count(out: Path, fold: str, submission: str) -> int:
    """Starts of a fold within one submission: a new submission has its tries anew."""
    return sum(entry.get("submission") == submission for entry in read_attempts(out, fold))


def open_attempt(out: Path, fold: str, start: Start) -> int:
    """Record a start and return its number within the submission, from 1; starts left open before it are closed as lost."""
    lost = "ended without a word: killed, out of memory, or the node failed"
    entries = [_closed(entry, "lost", lost) for entry in read_attempts(out, fold)]
    number = 1 + sum(entry.get("submission") == start.submission for entry in entries)
    entries.append(
        {
            "try": number,
            "start": now(),
            "end": None,
            "outcome": "running",
            "reason": "",
            "job": start.job,
            "restart": start.restart,
            "submission": start.submission,
            "time": time.time(),
        }
    )
    _write(out, fold, entries)
    return number


def close_attempt(out: Path, fold: str, start: Start, outcome: str, reason: str = "") -> None:
    """Close a start if it is open: `done`, `stopped`, `crashed` or `timeout`. Starts after it are left alone."""
    entries = read_attempts(out, fold)
    _write(out, fold, [_closed(entry, outcome, reason) if start.matches(entry) else entry for entry in entries])


def report_error(out: Path, fold: str, rank: int, error: Exception) -> None:
    """Keep a rank's exception for whoever settles the attempt; the rank that fails first names the reason.

    A UserError would come again at the next start (a missing file, a wrong key), so it ends the tries.
    """
    again = not isinstance(error, UserError)
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    line = " ".join(f"rank {rank}: {reason}".split())
    write_json(out / fold / "errors" / f"{rank}.json", {"time": time.time(), "reason": line[:500], "again": again})


def settle(out: Path, fold: str, start: Start, tries: int, otherwise: str, outcome: str = "crashed") -> Verdict:
    """Close a start whose processes are gone and say what follows; a final failure is written to status.json.

    `otherwise` is the reason where no rank left one (it was killed), `outcome` how such a start is called.
    """
    entries = read_attempts(out, fold)
    mine = next((entry for entry in entries if start.matches(entry)), None)
    if mine is None:  # it died before rank 0 could say that it had started
        open_attempt(out, fold, start)
        mine = {"outcome": "running", "time": 0.0}
    again = True
    if mine["outcome"] == "running":
        first = _first_error(out, fold, float(mine["time"]))
        again = bool(first.get("again", True))
        said = str(first.get("reason", otherwise))
        if _LOST_PEER.search(said) and "killed" in otherwise:  # out of memory, say
            said = f"{otherwise}; {said}"
        # a time limit explains the errors that come with it, not the other way round
        reason = otherwise if outcome == "timeout" else said
        close_attempt(out, fold, start, outcome, reason)
    shutil.rmtree(out / fold / "errors", ignore_errors=True)
    last = next(entry for entry in read_attempts(out, fold) if start.matches(entry))
    if last["outcome"] == "done":
        return Verdict("done", "")
    reason = f"{last['outcome']}: {last['reason']}" if last["reason"] else str(last["outcome"])
    started = count(out, fold, start.submission)
    if again and started < tries:
        return Verdict("again", reason)
    if started >= tries > 1:
        reason += f" (start {started} of {tries})"
    update_status(out, fold, state="failed", reason=reason)
    return Verdict("failed", reason)


def _first_error(out: Path, fold: str, since: float) -> dict[str, Any]:
    errors = [read_json(path) for path in sorted((out / fold / "errors").glob("*.json"))]
    # ranks do not start at the same moment; older files are of a start that nobody could settle
    mine = [error for error in errors if error.get("time", 0.0) >= since - 120]
    return min(mine, key=lambda error: (bool(_LOST_PEER.search(str(error.get("reason")))), float(error["time"])), default={})


def _closed(entry: dict[str, Any], outcome: str, reason: str) -> dict[str, Any]:
    return entry if entry.get("outcome") != "running" else {**entry, "end": now(), "outcome": outcome, "reason": reason}


def _write(out: Path, fold: str, entries: list[dict[str, Any]]) -> None:
    write_json(out / fold / "attempts.json", json.loads(json.dumps({"attempts": entries})))
