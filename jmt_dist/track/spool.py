"""The write-ahead record of a run: training appends to a local file and never waits for a server (DESIGN section 12).

`<folder>/events.jsonl` holds one record per line; `t` is milliseconds since 1970:
    {"t": …, "s": step, "m": {name: value}}     metrics; NaN and infinities are the strings "NaN", "Infinity", "-Infinity"
    {"t": …, "p": {name: value}}                params, as text
    {"t": …, "g": {name: value}}                tags, as text
    {"t": …, "a": path, "to": folder}           a file to store; relative to the folder above the spool's where it lies there
    {"t": …, "z": status}                       SCHEDULED, RUNNING, FINISHED, FAILED or KILLED
`jmt_dist.track.replay` sends them. MLflow ignores a point it already has (same name, time, step, value), so sending
twice stores once. For that to hold after a resume too, a step trained a second time gets the first one's time.
MLflow keeps NaN and stores an infinity as ±1.797e308.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
STATES = ("SCHEDULED", "RUNNING", "FINISHED", "FAILED", "KILLED")
WAITING = 10_000  # records kept in memory while the disk refuses them


class _Points:
    """Times and last values of one metric by step: 24 bytes a point, for runs of a million steps."""

    def __init__(self) -> None:
        self.steps, self.times, self.values = array("q"), array("q"), array("d")

    def place(self, step: int, now: int, value: float) -> tuple[int, bool]:
        """(time of this step's first record, whether its last value was this same one); remembers the point."""
        index = len(self.steps) if not self.steps or step > self.steps[-1] else bisect_left(self.steps, step)
        if index == len(self.steps) or self.steps[index] != step:
            self.steps.insert(index, step)
            self.times.insert(index, now)
            self.values.insert(index, value)
            return now, False
        before = self.values[index]
        self.values[index] = value
        return self.times[index], before == value or (math.isnan(before) and math.isnan(value))


class Spool:
    """Appends metrics, params, tags, artifacts and the state of one run to `<folder>/events.jsonl`.

    Safe to call from several threads. No call raises because of the disk or of a value that is not a number:
    records that cannot be written wait in memory and are tried again with the next one; what is lost in the end is
    counted in `dropped`, and `problem` says why. `None` as folder: a spool that keeps nothing, for ranks other than 0.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.dropped, self.problem = 0, ""
        self._lock = threading.Lock()
        self._file = -1
        self._torn = False  # the file does not end in a newline: the next record has to begin with one
        self._waiting: deque[bytes] = deque()
        self._points: dict[str, _Points] = {}
        if self.folder is None:
            return
        try:
            for name, step, time_of, value in read_points(self.folder):
                self._points.setdefault(name, _Points()).place(step, time_of, value)
        except OSError as error:
            self.problem = str(error)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record `values` at `step`. A value already recorded for its name and step is not written again."""
        if self.folder is None:
            return
        now = _now()
        with self._lock:
            by_time: dict[int, dict[str, float | str]] = {}
            for name, value in values.items():
                try:
                    number, at = float(value), int(step)
                except (TypeError, ValueError, OverflowError) as error:
                    self.dropped, self.problem = self.dropped + 1, f"metric {name}: {error}"
                    continue
                first, same = self._points.setdefault(str(name), _Points()).place(at, now, number)
                if not same:
                    by_time.setdefault(first, {})[str(name)] = number if math.isfinite(number) else _word(number)
            for first, group in by_time.items():
                self._append({"t": first, "s": int(step), "m": group})

    def next_step(self, name: str) -> int:
        """The step after the last one recorded of a metric; 0 for one that has none."""
        with self._lock:
            points = self._points.get(name)
            return points.steps[-1] + 1 if points and points.steps else 0

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; the store keeps the first value of each and refuses others."""
        self._record({"p": {str(k): str(v) for k, v in values.items()}})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record tags; the last value of each wins."""
        self._record({"g": {str(k): str(v) for k, v in values.items()}})

    def artifact(self, path: Path, name: str = "") -> None:
        """Record that the file `path` is to be stored, in the folder `name` of the run's artifacts ("" = their root).

        The file is read when it is sent, not now.
        """
        if self.folder is None:
            return
        absolute, home = os.path.abspath(path), os.path.abspath(self.folder.parent)
        inside = absolute.startswith(home + os.sep)
        self._record({"a": os.path.relpath(absolute, home) if inside else absolute, "to": name})

    def state(self, status: str) -> None:
        """Record that the run is now one of `STATES`; SCHEDULED: it stopped and is to go on."""
        if status not in STATES:
            raise ValueError(f"{status} is none of {', '.join(STATES)}")
        self._record({"z": status})

    def sync(self) -> None:
        """Force what was written to the disk. Slow on network disks: called by the shipper, never by training."""
        try:
            if self._file >= 0:
                os.fsync(self._file)
        except OSError as error:
            self.problem = str(error)

    def close(self) -> None:
        """Write what waits, force it to the disk and close the file; what still cannot be written is counted as dropped."""
        with self._lock:
            self._drain()
            self.dropped += len(self._waiting)
            self._waiting.clear()
        self.sync()
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _record(self, fields: dict[str, Any]) -> None:
        if self.folder is not None:
            with self._lock:
                self._append({"t": _now(), **fields})

    def _append(self, record: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        if len(self._waiting) > WAITING:
            self._waiting.popleft()
            self.dropped += 1
        self._drain()

    def _drain(self) -> None:
        """Write waiting records, oldest first, until one is refused."""
        try:
            while self._waiting:
                if self._file < 0:
                    self._open()
                line = b"\n" + self._waiting[0] if self._torn else self._waiting[0]
                written = 0
                while written < len(line):  # a write that fails half-way leaves a torn line: _open() sees it
                    written += os.write(self._file, line[written:])
                self._torn = False
                self._waiting.popleft()
        except OSError as error:
            self.problem = str(error)
            if self._file >= 0:  # a stale handle of a network disk stays stale: open anew next time
                broken, self._file = self._file, -1
                with contextlib.suppress(OSError):
                    os.close(broken)

    def _open(self) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / EVENTS
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        size = os.fstat(self._file).st_size
        if size:
            with open(path, "rb") as file:
                file.seek(size - 1)
                self._torn = file.read(1) != b"\n"


def read_records(folder: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(position after the line, record or None where the line cannot be read) for each whole line from `start` to `stop`.

    Metric values are floats. A last line without a newline is still being written, and left. Raises OSError.
    """
    path = folder / EVENTS
    if not path.exists():
        return
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size if stop is None else stop  # do not chase a live tail
        file.seek(start)
        while file.tell() < end:
            line = file.readline()
            if not line.endswith(b"\n"):
                return
            yield file.tell(), _parse(line)


def read_points(folder: Path) -> Iterator[tuple[str, int, int, float]]:
    """(name, step, time in ms, value) of every metric recorded, in the order of recording. Raises OSError."""
    for _, record in read_records(folder):
        if record is not None and "m" in record:
            for name, value in record["m"].items():
                yield name, record["s"], record["t"], value


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Curves {name: [(step, value), …]} of a spool, by step; where a step was recorded twice, the last value."""
    curves: dict[str, dict[int, float]] = {}
    for name, step, _, value in read_points(folder):
        curves.setdefault(name, {})[step] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


def read_params(folder: Path, stage: str) -> dict[str, str]:
    """The recipe in a spool, as the last start that was to run `stage` recorded it; {} where there is none. Raises OSError."""
    found: dict[str, str] = {}
    for _, record in read_records(folder):
        params = (record or {}).get("p", {})
        if f'"{stage}"' in params.get("stages", ""):
            found = dict(params)
    return found


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        int(record["t"])
        if "m" in record:
            int(record["s"])
            record["m"] = {str(name): float(value) for name, value in record["m"].items()}
        elif not any(isinstance(record.get(key), kind) for key, kind in (("p", dict), ("g", dict), ("a", str), ("z", str))):
            return None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return dict(record)


def _word(number: float) -> str:
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _now() -> int:
    return time.time_ns() // 1_000_000
