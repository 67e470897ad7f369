"""Runs in MLflow: created once before the jobs start, written by each job's own shipper thread (DESIGN section 12).

The process that submits calls `create_experiment` (database, experiment, parent run) and `create_child` for each fold;
a job's rank 0 then works inside `with Tracker(folder, uri, run_id) as tracker`, and only ever touches `tracker.spool`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from jmt_dist.errors import UserError
from jmt_dist.track.facts import flatten
from jmt_dist.track.patience import retried
from jmt_dist.track.replay import ReplayReport, replay, unsent
from jmt_dist.track.spool import STATES, Spool
from jmt_dist.track.system import SystemMetrics

SQLITE = "sqlite:///"
PARENT_FILE, RUN_FILE = "parent_run.json", "run.json"
INTERVAL_SECONDS = 2.0
SLOWEST_SECONDS = 30.0  # between attempts while the server does not answer
CLOSE_SECONDS = 5.0
FIRST_CLOSE_SECONDS = 15.0  # a run so short that MLflow is still being imported (2 to 6 s on a busy machine)
# one retry, 5 s each: with MLflow's own settings a call to a dead server takes 4 minutes (measured: 246 s)
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # it logs a traceback of each database error, and raises it too
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class ParentRun:
    """The MLflow run of an experiment, whose children are the folds. Kept in `<out>/parent_run.json`."""

    uri: str
    experiment_id: str
    run_id: str

    def save(self, out: Path) -> None:
        """Write `<out>/parent_run.json`."""
        _write_json(out / PARENT_FILE, asdict(self))

    @staticmethod
    def load(out: Path) -> ParentRun | None:
        """Read `<out>/parent_run.json`; None where there is none."""
        values = _read_json(out / PARENT_FILE)
        return ParentRun(**{key: str(values[key]) for key in ("uri", "experiment_id", "run_id")}) if values else None


@contextlib.contextmanager
def client_environment(seconds: int | None = None) -> Iterator[None]:
    """MLflow's environment for our calls: short timeouts, no telemetry, no chatter; what was set before comes back.

    `seconds` an answer may take instead, where nobody trains meanwhile: a large file takes a server longer.
    """
    before = {key: os.environ.get(key) for key in CLIENT_ENVIRONMENT}
    os.environ.update(CLIENT_ENVIRONMENT)
    if seconds is not None:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(seconds)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def connect(uri: str) -> Any:
    """An MlflowClient of `uri`. The first one for a SQLite file creates its tables, under a file lock.

    Six processes that open the same new file at once leave it unusable for ever (tried); behind the lock they do not.
    """
    from mlflow.tracking import MlflowClient

    if not uri.startswith(SQLITE):
        return MlflowClient(uri)
    path = Path(uri.removeprefix(SQLITE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)  # the client is lazy: this opens the store
        return client


def create_experiment(
    uri: str, name: str, tags: Mapping[str, Any], params: Mapping[str, Any], artifact_root: Path | None = None, run_name: str = ""
) -> ParentRun:
    """Create what the jobs will write to: the SQLite file if it is one, the experiment `name`, and its parent run.

    `params` may be nested (a recipe as a dict): groups become dotted names. `artifact_root`: where files are stored;
    default: `artifacts/` beside a SQLite file, the server's own place for a server. An experiment that exists is
    used. Raises UserError where the store cannot be reached or the experiment was deleted.
    """
    with client_environment(), _explained(uri):
        client = retried(lambda: connect(uri))
        experiment = client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            raise UserError(
                f"experiment `{name}` was deleted in {uri}",
                f"Restore it: mlflow experiments restore --experiment-id {experiment.experiment_id}, or choose another name.",
            )
        if experiment is None:
            if artifact_root is None and uri.startswith(SQLITE):
                artifact_root = Path(uri.removeprefix(SQLITE)).parent / "artifacts"
            location = artifact_root.resolve().as_uri() if artifact_root is not None else None
            experiment_id = retried(lambda: _create_named(client, name, location))
        else:
            experiment_id = experiment.experiment_id
        text = {str(key): str(value) for key, value in tags.items()}
        run = retried(lambda: client.create_run(experiment_id, run_name=run_name or name, tags=text))
        _log_params(client, run.info.run_id, params)
        return ParentRun(uri, str(experiment_id), run.info.run_id)


def create_child(
    parent: ParentRun, fold: str, tags: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None, of: str = ""
) -> str:
    """Create the run of one fold under `parent`; returns its id. Raises UserError where the store cannot be reached.

    `of`: the experiment's name, which the run's begins with: two runs beside one another must not both be `fold-1`.
    """
    with client_environment(), _explained(parent.uri):
        client = retried(lambda: connect(parent.uri))
        text = {str(key): str(value) for key, value in (tags or {}).items()} | {"mlflow.parentRunId": parent.run_id, "fold": fold}
        run = retried(lambda: client.create_run(parent.experiment_id, run_name=f"{of}/{fold}" if of else fold, tags=text))
        _log_params(client, run.info.run_id, params or {})
        return str(run.info.run_id)


def save_run(spool: Path, uri: str, run_id: str) -> None:
    """Write `<spool>/run.json`: where this spool's records belong."""
    spool.mkdir(parents=True, exist_ok=True)
    _write_json(spool / RUN_FILE, {"uri": uri, "run_id": run_id})


def load_run(spool: Path) -> tuple[str, str]:
    """(uri, run id) of `<spool>/run.json`; empty strings where the spool belongs to no run yet."""
    values = _read_json(spool / RUN_FILE)
    return str(values.get("uri", "")), str(values.get("run_id", ""))


class Tracker:
    """The tracking of one fold's job: `spool`, and a thread that sends it to MLflow every two seconds.

    `system_seconds`: how often the machine is measured (`track.system`); 0: never.
    With an empty `uri` or `run_id` the records stay in the spool, for `launch/sync_tracking.py`. With `folder` None
    (ranks other than 0) nothing is kept. Used as a context manager it records RUNNING, and at the end FINISHED, or
    FAILED after an exception, KILLED after Ctrl-C or an exit, or what the exception's class says in `tracking_state`
    (a requested stop: SCHEDULED). A resumed job goes on with the same run.
    """

    def __init__(self, folder: Path | None, uri: str = "", run_id: str = "", system_seconds: float = 0) -> None:
        self.spool = Spool(folder)
        self.system = SystemMetrics(self.spool, system_seconds)
        self.uri, self.run_id = uri, run_id
        self.problem = ""  # why the last attempt to send failed; "" after one that worked
        self.report = ReplayReport()  # of the last attempt that worked
        self._stop = threading.Event()
        self._left_alone = threading.Event()  # close() waited long enough: no further attempt
        self._ready = threading.Event()  # MLflow is imported, and the store open
        self._environment = contextlib.ExitStack()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Tracker:
        if self.spool.folder is None:
            return self
        self.spool.state("RUNNING")
        # set once, by this thread, before training starts others: changing the environment later is not thread-safe in C
        self._environment.enter_context(client_environment())
        self._thread = threading.Thread(target=self._ship, name="tracking", daemon=True)
        self._thread.start()
        self.system.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(_state_after(kind))

    def close(self, status: str = "FINISHED") -> None:
        """Record the state, give the shipper 5 s to send the rest, and leave what it cannot send to sync_tracking."""
        if self.spool.folder is None:
            return
        self.system.stop()
        self.spool.state(status)
        self._stop.set()
        if self._thread is not None:
            started = time.monotonic()
            while self._thread.is_alive():
                limit = CLOSE_SECONDS if self._ready.is_set() or not self._sends else FIRST_CLOSE_SECONDS
                if time.monotonic() - started > limit:
                    break
                self._thread.join(timeout=0.1)
            self._left_alone.set()
        self.spool.close()
        if self._thread is None or not self._thread.is_alive():  # a call still under way must keep its short timeouts
            self._environment.close()
        self._say_what_is_left()

    @property
    def _sends(self) -> bool:
        return bool(self.uri and self.run_id)

    def _ship(self) -> None:
        client: Any = None
        wait = INTERVAL_SECONDS
        while True:
            stopping = self._stop.wait(wait)
            self.spool.sync()
            if self._sends and not self._left_alone.is_set():
                try:
                    client = client or connect(self.uri)
                    self._ready.set()
                    assert self.spool.folder is not None
                    self.report = replay(self.spool.folder, client, self.run_id)
                    self.problem, wait = "", INTERVAL_SECONDS
                except Exception as error:  # whatever the server or its client does, training goes on
                    self.problem, wait = _one_line(error), min(2 * wait, SLOWEST_SECONDS)
            if stopping:
                return

    def _say_what_is_left(self) -> None:
        assert self.spool.folder is not None
        out = self.spool.folder.parent.parent
        if self.spool.dropped:
            print(f"tracking: {self.spool.dropped} records could not be written: {self.spool.problem}", file=sys.stderr)
        left = unsent(self.spool.folder, self.run_id) if self._sends else 0
        if left:
            why = f" ({self.problem})" if self.problem else ""
            remedy = f"python launch/sync_tracking.py {shlex.quote(f'out={out}')} sends them"
            print(f"tracking: {left} records wait in {self.spool.folder}{why}; {remedy}", file=sys.stderr)


def _state_after(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "FINISHED"
    if issubclass(kind, KeyboardInterrupt | SystemExit | GeneratorExit):
        return "KILLED"
    state = getattr(kind, "tracking_state", "FAILED")
    return state if state in STATES else "FAILED"  # an error here would hide the exception that is on its way


def _create_named(client: Any, name: str, location: str | None) -> str:
    """Create the experiment, or take the one that another process created in the meantime."""
    from mlflow.exceptions import MlflowException

    try:
        # without the tag MLflow's pages take it for one of language models, and hide the curves behind other menus
        return str(client.create_experiment(name, artifact_location=location, tags={"mlflow.experimentKind": "custom_model_development"}))
    except MlflowException as error:
        existing = client.get_experiment_by_name(name) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
        if existing is None:
            raise
        return str(existing.experiment_id)


def _log_params(client: Any, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(key, value[:6000]) for key, value in flatten(params).items()]
    if entries:
        retried(lambda: client.log_batch(run_id, params=entries))


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        local = uri.startswith(SQLITE)
        remedy = "Look whether the file is whole and writable." if local else "Start the server, or leave site.tracking_uri empty."
        raise UserError(f"the tracking store {uri} cannot be used: {_one_line(error)}", remedy) from error


def _one_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 300 else f"{text[:120]} … {text[-180:]}"  # HTTP errors say the reason last


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}", "Remove it to track this run anew.") from None
    return values if isinstance(values, dict) else {}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(scratch, path)
