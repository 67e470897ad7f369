"""Sends a spool to MLflow: as often as one likes, from as many processes as one likes, each record is stored once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmt_dist.track.spool import EVENTS, STATES, read_records

OFFSET, LOCK = "offset.json", "lock"
METRICS_PER_CALL = 900  # the server takes 1,000 entries a call
ENTRIES_PER_CALL = 90  # params or tags: 100 a call


@dataclass
class ReplayReport:
    """What one replay did. `left` counts the records that are still to be sent."""

    metrics: int = 0
    params: int = 0
    tags: int = 0
    artifacts: int = 0
    state: str = ""
    left: int = 0
    unreadable: int = 0  # torn or foreign lines, skipped
    refused: tuple[str, ...] = ()  # names the server will never take, with the reason
    missing: tuple[str, ...] = ()  # artifacts whose file is gone
    busy: bool = False  # another process is sending this spool right now

    @property
    def sent(self) -> int:
        """Everything sent in this replay."""
        return self.metrics + self.params + self.tags + self.artifacts


@dataclass
class _Offset:
    run_id: str
    position: int = 0  # metrics, params, tags and states before it are stored
    artifacts: int = 0  # artifacts before it are stored


def replay(folder: Path, client: Any, run_id: str) -> ReplayReport:
    """Send what the spool in `folder` has gained since the last replay to `run_id` through an MlflowClient.

    Metrics, params, tags and states go first, artifacts after them, each with its own offset in `offset.json`; it
    moves only after the server has taken a batch. An offset of another run counts as 0. Lines that cannot be read are
    skipped and counted. Raises what the client raises when the server cannot be reached: nothing is lost, send again.
    """
    report = ReplayReport()
    if not (folder / EVENTS).exists():
        return report
    with _alone(folder) as alone:
        if not alone:
            report.busy, report.left = True, unsent(folder, run_id)
            return report
        offset = _read_offset(folder, run_id)
        stop = (folder / EVENTS).stat().st_size
        _Sender(folder, client, offset, report).send(stop)
        _send_artifacts(folder, client, offset, report, stop)
    report.left = unsent(folder, run_id)
    return report


def unsent(folder: Path, run_id: str) -> int:
    """Records of the spool in `folder` that `run_id` has not got yet."""
    if not (folder / EVENTS).exists():
        return 0
    offset = _read_offset(folder, run_id)
    start = min(offset.position, offset.artifacts)
    return sum(
        end > (offset.artifacts if "a" in record else offset.position) for end, record in read_records(folder, start) if record is not None
    )


class _Sender:
    """Collects records into calls, and moves the offset after each."""

    def __init__(self, folder: Path, client: Any, offset: _Offset, report: ReplayReport) -> None:
        self.folder, self.client, self.offset, self.report = folder, client, offset, report
        self.metrics: list[Any] = []
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.known: dict[str, str] | None = None  # params the run already has; None before the first call

    def send(self, stop: int) -> None:
        from mlflow.entities import Metric

        end = self.offset.position
        for end, record in read_records(self.folder, self.offset.position, stop):
            if record is None:
                self.report.unreadable += 1
                continue
            self.metrics += [Metric(metric_name(k), v, record["t"], record["s"]) for k, v in record.get("m", {}).items()]
            for name, value in record.get("p", {}).items():
                self.params.setdefault(metric_name(name), str(value))
            self.tags.update({metric_name(name): str(value) for name, value in record.get("g", {}).items()})
            if len(self.metrics) >= METRICS_PER_CALL or "z" in record:
                self._flush()
                if "z" in record:
                    self._state(record["z"], record["t"])
                self._move(end)
        self._flush()
        self._move(end)

    def _open(self) -> dict[str, str]:
        """The params the run has. Raises where the run is deleted: MLflow would call each entry invalid, and none would be kept."""
        if self.known is None:
            run = self.client.get_run(self.offset.run_id)
            if run.info.lifecycle_stage != "active":
                raise RuntimeError(f"run {self.offset.run_id} is deleted: restore it in MLflow")
            self.known = dict(run.data.params)
        return self.known

    def _flush(self) -> None:
        from mlflow.entities import Param, RunTag

        if not (self.metrics or self.params or self.tags):
            return
        known = self._open()
        for start in range(0, len(self.metrics), METRICS_PER_CALL):
            self.report.metrics += self._batch("metrics", self.metrics[start : start + METRICS_PER_CALL])
        if self.params:
            new = {k: v for k, v in self.params.items() if k not in known}
            changed = [f"param {k}: stays {known[k]}" for k, v in self.params.items() if known.get(k, v)[:6000] != v[:6000]]
            self.report.refused += tuple(changed)
            entries = [Param(k, v[:6000]) for k, v in new.items()]  # the store's limit, applied here to keep it silent
            for start in range(0, len(entries), ENTRIES_PER_CALL):
                self.report.params += self._batch("params", entries[start : start + ENTRIES_PER_CALL])
            known.update(new)
        tags = [RunTag(k, v[:5000]) for k, v in self.tags.items()]
        for start in range(0, len(tags), ENTRIES_PER_CALL):
            self.report.tags += self._batch("tags", tags[start : start + ENTRIES_PER_CALL])
        self.metrics, self.params, self.tags = [], {}, {}

    def _batch(self, kind: str, entries: list[Any]) -> int:
        """Send entries; halve the batch around one that the server calls invalid, so that it cannot block the rest."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_batch(self.offset.run_id, **{kind: entries})
            return len(entries)
        except MlflowException as error:
            # BAD_REQUEST is no verdict on the entries: MLflow's server also answers it when its database is busy
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(entries) == 1:
                self.report.refused += (f"{kind.removesuffix('s')} {entries[0].key}: {str(error).splitlines()[0][:200]}",)
                return 0
        half = len(entries) // 2
        return self._batch(kind, entries[:half]) + self._batch(kind, entries[half:])

    def _state(self, status: str, when: int) -> None:
        if status not in STATES:
            self.report.unreadable += 1
        elif status in ("SCHEDULED", "RUNNING"):
            self.client.update_run(self.offset.run_id, status=status)
            self.report.state = status
        else:
            self.client.set_terminated(self.offset.run_id, status, end_time=when)
            self.report.state = status

    def _move(self, position: int) -> None:
        if position != self.offset.position:
            self.offset.position = position
            _write_offset(self.folder, self.offset)


def _send_artifacts(folder: Path, client: Any, offset: _Offset, report: ReplayReport, stop: int) -> None:
    """Files go last and by themselves: one that the server will not take must not hold back the metrics."""
    done: set[tuple[str, str]] = set()
    before = offset.artifacts
    for end, record in read_records(folder, offset.artifacts, stop):
        if record is not None and "a" in record:
            path, target = os.path.join(os.path.abspath(folder.parent), record["a"]), str(record.get("to", ""))
            if not os.path.exists(path):
                report.missing += (record["a"],)
            elif (path, target) not in done:  # a file recorded several times is sent once, as it is now
                client.log_artifact(offset.run_id, path, target or None)
                done.add((path, target))
                report.artifacts += 1
        offset.artifacts = end
        if record is not None and "a" in record:
            _write_offset(folder, offset)
    if offset.artifacts != before:
        _write_offset(folder, offset)


def metric_name(name: str) -> str:
    """The name of a metric, param or tag with every character that MLflow does not take replaced by an underscore."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _read_offset(folder: Path, run_id: str) -> _Offset:
    try:
        values = json.loads((folder / OFFSET).read_text(encoding="utf-8"))
        offset = _Offset(str(values["run_id"]), int(values["position"]), int(values["artifacts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return _Offset(run_id)
    size = (folder / EVENTS).stat().st_size
    return offset if offset.run_id == run_id and max(offset.position, offset.artifacts) <= size else _Offset(run_id)


def _write_offset(folder: Path, offset: _Offset) -> None:
    scratch = folder / f".{OFFSET}.{os.getpid()}"
    try:
        scratch.write_text(json.dumps(vars(offset)), encoding="utf-8")
        os.replace(scratch, folder / OFFSET)
    finally:
        scratch.unlink(missing_ok=True)  # a full disk leaves half of it


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether this process is the only one sending this spool: two would store each point once, but at twice the cost."""
    with open(folder / LOCK, "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks: sending twice is harmless
            pass
        yield True
