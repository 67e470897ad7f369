"""Several processes that write one store, and disks that are full: nothing is lost, nothing is stored twice."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from jmt_dist.config import Recipe
from jmt_dist.errors import UserError
from jmt_dist.recipe import build, dump, word_layer
from jmt_dist.track.patience import Patient, retried
from jmt_dist.track.replay import METRICS_PER_CALL, OFFSET
from jmt_dist.track.spool import Spool
from jmt_dist.track.sync import left, sync
from jmt_dist.track.tracker import ParentRun, connect, load_run
from tests.track.server import Server

ROOT = Path(__file__).parents[2]
FOLDS = ("fold-1", "official")
STEPS = 3_000
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")


def spooled(out: Path, steps: int = STEPS) -> Path:
    """A run folder of two folds that only spooled: `steps` points each, and a file."""
    out.mkdir(parents=True)
    dump(build(Recipe, [word_layer(f"name={out.name}")]), out / "recipe.yaml")
    for index, fold in enumerate(FOLDS):
        spool = Spool(out / fold / "spool")
        spool.state("RUNNING")
        for step in range(steps):
            spool.metrics({"fusion/loss": step / 3 + index}, step)
        (out / fold / "note.txt").write_text(f"{fold}\n" * 1_000)
        spool.artifact(out / fold / "note.txt", "notes")
        spool.state("FINISHED")
        spool.close()
    return out


def check(out: Path, uri: str, steps: int = STEPS) -> None:
    """Every point once, in one run per fold, under one run for the folder."""
    client, parent = connect(uri), ParentRun.load(out)
    assert parent is not None and left(out) == 0
    runs = [run for run in client.search_runs([parent.experiment_id]) if run.data.tags.get("mlflow.parentRunId") is not None]
    assert {run.data.tags["fold"]: run.info.run_id for run in runs} == {fold: load_run(out / fold / "spool")[1] for fold in FOLDS}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {parent.run_id} and len(runs) == len(FOLDS)
    assert len(client.search_runs([parent.experiment_id])) == 1 + len(FOLDS)
    for index, fold in enumerate(FOLDS):
        run_id = load_run(out / fold / "spool")[1]
        points = sorted((point.step, point.value) for point in client.get_metric_history(run_id, "fusion/loss"))
        assert points == [(step, step / 3 + index) for step in range(steps)]
        assert client.get_run(run_id).info.status == "FINISHED"
        note = Path(client.download_artifacts(run_id, "notes/note.txt"))
        assert note.read_text() == f"{fold}\n" * 1_000
    assert not [path for path in out.rglob(".*") if path.is_file()]  # nothing half-written


def program(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch" / "sync_tracking.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(*jobs: subprocess.Popen[str]) -> list[str]:
    said = [job.communicate(timeout=400) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * len(jobs), said
    assert not any(err for _, err in said), said
    return [out for out, _ in said]


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
def test_two_programs_write_one_sqlite_file_that_is_locked_for_longer_than_mlflow_waits(template: Any, tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copy(template[0] / "mlflow.db", database)
    uri, one, two = f"sqlite:///{database}", spooled(tmp_path / "one"), spooled(tmp_path / "two")
    with closing(sqlite3.connect(database, isolation_level=None)) as third:
        third.execute("BEGIN EXCLUSIVE")
        jobs = [program(f"out={one}"), program(f"out={two}")]  # both find the file beside the run folder
        until(lambda: any(file.path == str(database) for job in jobs for file in psutil.Process(job.pid).open_files()))
        time.sleep(21)  # MLflow's busy_timeout is 20 s: whoever opened the file has been told that it is locked
        third.execute("ROLLBACK")
    ended(*jobs)
    check(one, uri)
    check(two, uri)
    same = spooled(tmp_path / "same")
    said = ended(program(f"out={same}"), program(f"out={same}"))
    check(same, uri)
    assert sum(f"{fold}: 3001 sent, 0 left" in out for out in said for fold in FOLDS) == 2  # one of them did the work, once


@pytest.mark.server
def test_two_programs_that_send_the_same_run_folder_to_a_server_make_one_run(tmp_path: Path) -> None:
    server = Server("workers=1")
    try:
        server.start()
        out = spooled(tmp_path / "same")
        jobs = [program(f"out={out}", f"uri={server.uri}", "watch=true", "every=0.5") for _ in range(2)]
        for fold in FOLDS:
            (out / fold / "status.json").write_text(json.dumps({"state": "done"}))
        ended(*jobs)
        check(out, server.uri)
    finally:
        server.remove()


def test_locked_is_tried_again_and_nothing_else_is() -> None:
    class Store:
        def __init__(self, *problems: Exception) -> None:
            self.problems, self.calls = list(problems), 0

        def log_batch(self, run_id: str, metrics: list[int]) -> list[int]:
            self.calls += 1
            if self.problems:
                raise self.problems.pop(0)
            return [*metrics, len(run_id)]

    busy = sqlite3.OperationalError("database is locked")
    store = Store(busy, busy)
    assert Patient(store).log_batch("run", metrics=[1]) == [1, 3] and store.calls == 3
    for error, calls in ((ConnectionError("gone"), 1), (busy, 2)):
        store = Store(*[error] * 9)
        with pytest.raises(type(error)):
            retried(lambda store=store: store.log_batch("run", []), tries=2)  # type: ignore[misc]
        assert store.calls == calls


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of `size` at `folder`; yields what gives it another one."""
    folder.mkdir()

    def mount(size: str, *more: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([*more, f"size={size}"]), "tmpfs", str(folder)], check=True)

    mount(size)
    try:
        yield lambda size: mount(size, "remount")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # MLflow keeps its file open


def fill(folder: Path) -> Path:
    path = folder / "somebody-elses"
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while file.write(bytes(4096)):
            pass
    return path


@pytest.mark.slow
@only_root
def test_a_sqlite_file_that_cannot_grow_keeps_what_it_has_and_takes_the_rest_later(template: Any, tmp_path: Path) -> None:
    out, disk = spooled(tmp_path / "run", 6_000), tmp_path / "disk"
    source = template[0] / "mlflow.db"
    with small_disk(disk, f"{source.stat().st_size // 1024 + 900}k") as resize:
        shutil.copy(source, disk / "mlflow.db")
        uri = f"sqlite:///{disk}/mlflow.db"
        folds = sync(out, uri)
        problem = f"the disk of {uri} is full: free some space, and the same command sends the rest"
        assert problem in [fold.problem for fold in folds] and {fold.problem for fold in folds} <= {problem, ""}
        stuck = next(fold for fold in folds if fold.problem)
        assert 0 < stuck.report.left < 6_003 - METRICS_PER_CALL  # a part of it got in, and is not sent again
        again = {fold.fold: fold for fold in sync(out, uri)}[stuck.fold]
        assert again.problem == problem and again.run_id == stuck.run_id
        with closing(sqlite3.connect(disk / "mlflow.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        resize("64m")
        assert [fold.problem for fold in sync(out, uri)] == ["", ""]
        check(out, uri, 6_000)
        assert sum(fold.report.sent for fold in sync(out, uri)) == 0


@pytest.mark.slow
@only_root
def test_a_run_folder_on_a_full_disk_makes_no_second_run_and_no_second_point(template: Any, tmp_path: Path) -> None:
    shutil.copy(template[0] / "mlflow.db", tmp_path / "mlflow.db")
    uri, disk = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "disk"
    with small_disk(disk, "2m"):
        out = spooled(disk / "run")
        other = fill(disk)
        with pytest.raises(UserError, match=r"parent_run.json cannot be written: No space left on device. Free some space"):
            sync(out, uri)
        assert connect(uri).get_experiment_by_name("run") is None  # nothing was made that no file would know
        other.unlink()
        assert sync(out, uri)[0].report.sent == STEPS + 1
        for fold in FOLDS:
            (out / fold / "spool" / OFFSET).unlink()  # both would be sent from the beginning
        (out / FOLDS[1] / "spool" / "run.json").unlink()
        before = {run.info.run_id for run in connect(uri).search_runs(["1", "2"])}
        fill(disk)
        first, second = sync(out, uri)
        assert first.problem == f"the disk of {out / FOLDS[0] / 'spool'} is full: free some space, and the same command sends the rest"
        assert "run.json cannot be written: No space left on device" in second.problem and second.report.left == STEPS + 3
        assert {run.info.run_id for run in connect(uri).search_runs(["1", "2"])} == before
        assert not [path for path in out.rglob(".*") if path.is_file()]
        other.unlink()
        connect(uri).delete_run(next(iter(before - {ParentRun.load(out).run_id, first.run_id} - template_runs(template))))  # type: ignore[union-attr]
        assert [fold.problem for fold in sync(out, uri)] == ["", ""]
        check(out, uri)


def template_runs(template: Any) -> set[str]:
    return {template[1].run_id}
