"""Sends what the folds of a run folder left in their spools: after a dead server, or always where jobs only spool."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from jmt_dist.errors import UserError
from jmt_dist.track.patience import Patient, is_full, reserved, retried
from jmt_dist.track.replay import ReplayReport, replay, unsent
from jmt_dist.track.spool import EVENTS, read_records
from jmt_dist.track.tracker import (
    PARENT_FILE,
    RUN_FILE,
    SQLITE,
    ParentRun,
    client_environment,
    connect,
    create_child,
    create_experiment,
    load_run,
)

LOCK = "parent_run.lock"
ENDS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}  # status.json of a fold to MLflow's states
GOES_ON = ("RUNNING", "SCHEDULED")


@dataclass(frozen=True)
class FoldSync:
    """What happened to one fold's spool; `problem` says why records are left."""

    fold: str
    run_id: str
    report: ReplayReport
    problem: str = ""


def sync(out: Path, uri: str = "") -> list[FoldSync]:
    """Replay the spools of all folds in `out`; what is stored already is not stored again.

    The store is `uri`, else the one in parent_run.json or run.json, else a SQLite file beside the run folder. Runs that
    do not exist yet are created from the run folder and remembered in it, once however many processes do this. Raises UserError
    where the store cannot be opened, a run could not be remembered, or there is nothing to send; a fold that fails is reported.
    """
    spools = sorted(path.parent for path in out.glob(f"*/spool/{EVENTS}"))
    if not spools and any(out.glob(f"*/spool/{RUN_FILE}")):
        return []  # submitted, and no fold has started yet
    if not spools:
        raise UserError(f"{out} has no spools", "Give a run folder in which a fold has started.")
    store = uri or _recorded(out, spools) or f"{SQLITE}{out.resolve().parent / 'mlflow.db'}"
    with client_environment(seconds=60), _one_writer(store):
        try:
            client = Patient(retried(lambda: connect(store)))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            remedy = "Free some space, and give the same command." if is_full(error) else "Start it, or give uri=…."
            raise UserError(f"the tracking store {store} cannot be used: {reason}", remedy) from error
        parent = _parent(out, store, spools)
        return [_sync_fold(spool, client, store, parent) for spool in spools]


def _recorded(out: Path, spools: list[Path]) -> str:
    parent = ParentRun.load(out)
    return parent.uri if parent else next((found for found, _ in map(load_run, spools) if found), "")


def _parent(out: Path, store: str, spools: list[Path]) -> ParentRun | None:
    """The experiment's run; where there is none and a fold will need it, one that is made now."""
    with _locked(out / LOCK):  # another process may be about to make it, or its children
        parent = ParentRun.load(out)
        if parent is None and any(not run_id for _, run_id in map(load_run, spools)):
            with reserved(out / PARENT_FILE) as remember:
                parent = create_experiment(store, _name(out), {"folder": str(out.resolve())}, _recipe(out))
                remember(asdict(parent))
        return parent


def left(out: Path) -> int:
    """Records in the spools of `out` that are not stored yet."""
    return sum(unsent(path.parent, load_run(path.parent)[1]) for path in out.glob(f"*/spool/{EVENTS}"))


def unclosed(out: Path) -> bool:
    """Whether a fold has ended without a last word of its own: everything may be stored, and its run still be open."""
    return any(_unsaid(path.parent) for path in out.glob(f"*/spool/{EVENTS}"))


def finished(out: Path) -> bool:
    """Whether no fold goes on or is still to start: each is done, failed or stopped."""
    return all(_state(path.parent) in ENDS for path in out.glob("*/spool"))


@contextlib.contextmanager
def _one_writer(store: str) -> Iterator[None]:
    """Wait until no other process sends to this SQLite file: a watcher and the comparison job may be on two machines."""
    if not store.startswith(SQLITE):
        yield
        return
    path = Path(store.removeprefix(SQLITE))
    with _locked(path.with_name(f"{path.name}.writer")):
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of this file."""
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path, "a", encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be opened: {error.strerror}", "Free some space, or look who may write there.") from error
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sync_fold(spool: Path, client: Any, store: str, parent: ParentRun | None) -> FoldSync:
    fold, run_id = spool.parent.name, load_run(spool)[1]
    try:
        run_id = run_id or _child(spool, parent)
        report = replay(spool, client, run_id)
        if not report.left:
            _end(spool, client, run_id)
        return FoldSync(fold, run_id, report)
    except Exception as error:
        problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            problem = f"run {run_id} is not in {store}: give uri= of its store, or remove {spool / 'run.json'} to store it anew"
        elif is_full(error):
            where = spool if isinstance(error, OSError) else store
            problem = f"the disk of {where} is full: free some space, and the same command sends the rest"
        return FoldSync(fold, run_id, ReplayReport(left=unsent(spool, run_id)), problem)


def _child(spool: Path, parent: ParentRun | None) -> str:
    """The run of a fold that has none, made and remembered; another process may have done so meanwhile."""
    out = spool.parent.parent
    with _locked(out / LOCK):
        kept, run_id = load_run(spool)
        if not run_id:
            assert parent is not None
            with reserved(spool / RUN_FILE) as remember:
                run_id = create_child(parent, spool.parent.name, of=_name(out))
                remember({"uri": kept, "run_id": run_id})  # an empty uri stays empty: the job goes on spooling only
        return run_id


def _recipe(out: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _name(out: Path) -> str:
    return str(_recipe(out).get("name", out.resolve().name))


def _end(spool: Path, client: Any, run_id: str) -> None:
    """Close the run of a job that was killed before it could say so, by what the scheduler wrote into status.json."""
    end = _unsaid(spool)
    if end and client.get_run(run_id).info.status in GOES_ON:
        client.set_terminated(run_id, end)


def _unsaid(spool: Path) -> str:
    """The end of a fold by its status.json, where its own last word in the spool is that it goes on; else ""."""
    end = ENDS.get(_state(spool.parent), "")
    if not end:  # a spool takes seconds to read by the end of a long fold, and a watcher comes every five
        return ""
    states = [record["z"] for _, record in read_records(spool) if record and "z" in record]
    return end if states and states[-1] in GOES_ON else ""


def _state(fold: Path) -> str:
    try:
        return str(json.loads((fold / "status.json").read_text(encoding="utf-8")).get("state", ""))
    except (OSError, ValueError, AttributeError):
        return ""
