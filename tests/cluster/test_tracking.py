"""Runs of a submission under SLURM without a tracking URI: jobs only spool, one process writes, lost jobs are closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jmt_dist.cluster import tracking
from jmt_dist.cluster.compare import compare
from jmt_dist.cluster.options import SubmitOptions
from jmt_dist.cluster.snapshot import Snapshot
from jmt_dist.cluster.status import read_json, read_status, update_status, write_json
from jmt_dist.cluster.submit import make_plan
from jmt_dist.errors import UserError
from jmt_dist.recipe import dump, load_recipe, load_site
from jmt_dist.track.replay import replay
from jmt_dist.track.spool import Spool
from jmt_dist.track.sync import left, sync
from jmt_dist.track.tracker import ParentRun, connect, create_child, load_run, save_run
from tests.cluster import fakeslurm
from tests.cluster.conftest import Workplace
from tests.cluster.test_slurm import slurm  # noqa: F401

JOB = """
import json, os, socket, sys, time
opened = []
def watch(event, arguments):
    if event in ("open", "sqlite3.connect", "socket.connect"):
        opened.append(f"{event} {arguments[0] if event != 'socket.connect' else arguments[1]}")
sys.addaudithook(watch)
from pathlib import Path
from jmt_dist.track.tracker import Tracker, load_run
spool = Path(sys.argv[1])
with Tracker(spool, *load_run(spool), system_seconds=0.2 * (sys.argv[2] == "ends")) as tracker:
    for step in range(200):
        tracker.spool.metrics({"visual/train/loss": 1 / (step + 1)}, step)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
    while tracker.spool.next_step("system/cpu_utilization_percentage") < 1:
        time.sleep(0.05)
print(json.dumps([line for line in opened if "mlflow.db" in line or not line.startswith("open ")]))
"""


@pytest.mark.slow  # twelve seconds on an idle machine: a store, and five jobs
def test_without_a_uri_slurm_jobs_only_spool_and_one_process_writes(workplace: Workplace, slurm: Path) -> None:  # noqa: F811
    out = workplace.out()
    words = [str(workplace.recipe)], [str(workplace.site)]
    recipe, site = load_recipe(words[0][0], []), load_site(words[1][0], ["executor=slurm"])
    plan = make_plan(SubmitOptions(recipe=words[0][0], site=words[1][0], out=str(out)), recipe, site, "toyjob:run_fold", "toyjob:compare")
    tracking.prepare(plan, Snapshot("", "cd" * 32, "ab" * 20, ("config.py",), ""))
    store = out.parent / "mlflow.db"
    assert json.loads((out / "parent_run.json").read_text())["uri"] == f"sqlite:///{store}"
    assert all(load_run(out / fold / "spool")[0] == "" and load_run(out / fold / "spool")[1] for fold in plan.folds)
    before = store.stat().st_mtime_ns

    ends = {"official": "ends", "fold-1": "killed", "fold-2": "killed", "fold-3": "killed"}
    for fold, end in ends.items():
        update_status(out, fold, state="done" if end == "ends" else "running")
        job = subprocess.run([sys.executable, "-c", JOB, str(out / fold / "spool"), end], capture_output=True, text=True, timeout=120)
        assert job.returncode == (0 if end == "ends" else -9), job.stderr
        if end == "ends":
            assert json.loads(job.stdout) == []  # no database, no server
    assert store.stat().st_mtime_ns == before and not list(store.parent.glob("mlflow.db-*"))

    # official is done; fold-1's job was cancelled, fold-2's node died, fold-3 is still in the queue; fold-4 and fold-5 wait
    entries = [{"fold": fold, "job": f"100_{n}"} for n, fold in enumerate(plan.folds)]
    write_json(out / "jobs.json", {"executor": "slurm", "folds": list(plan.folds), "array": "100", "jobs": entries})
    states = {"official": "COMPLETED", "fold-1": "CANCELLED by 0", "fold-2": "NODE_FAIL", "fold-3": "RUNNING"}
    for entry in entries:
        fakeslurm.write(entry["job"], state=states.get(entry["fold"], "PENDING"))
        if entry["fold"] in ("fold-4", "fold-5"):
            update_status(out, entry["fold"], state="waiting")
    compare(out)
    client = connect(f"sqlite:///{store}")
    runs = {fold: client.get_run(load_run(out / fold / "spool")[1]) for fold in plan.folds}
    expected = {"official": "FINISHED", "fold-1": "KILLED", "fold-2": "FAILED"} | dict.fromkeys(("fold-3", "fold-4", "fold-5"), "RUNNING")
    assert {fold: run.info.status for fold, run in runs.items()} == expected
    assert read_status(out, "fold-1")["reason"] == "job 100_1 is gone: CANCELLED"
    assert read_status(out, "fold-2")["reason"] == "job 100_2 is gone: NODE_FAIL" and read_status(out, "fold-3")["state"] == "running"
    for fold in ends:
        assert len(client.get_metric_history(runs[fold].info.run_id, "visual/train/loss")) == 200
    parent = client.get_run(runs["official"].data.tags["mlflow.parentRunId"])
    assert parent.info.status == "RUNNING" and parent.data.tags["code.dirty"] == "true"
    assert parent.data.tags["mlflow.source.git.commit"] == "ab" * 20

    update_status(out, "fold-2", state="running")  # submitted again: the same run goes on, to its end
    spool = out / "fold-2" / "spool"
    job = subprocess.run([sys.executable, "-c", JOB, str(spool), "ends"], capture_output=True, text=True, timeout=120)
    assert job.returncode == 0, job.stderr
    update_status(out, "fold-2", state="done")
    sync(out)
    run = client.get_run(runs["fold-2"].info.run_id)
    assert run.info.status == "FINISHED" and len(client.get_metric_history(run.info.run_id, "visual/train/loss")) == 200


def test_the_run_of_a_killed_job_is_closed_though_all_it_recorded_is_stored(store: tuple[Any, ParentRun], tmp_path: Path) -> None:
    """Killed for its memory in a long step, say: its thread had sent everything, and the scheduler wrote the status."""
    client, parent = store
    dump(load_recipe(None, ["name=demo"]), tmp_path / "recipe.yaml")
    parent.save(tmp_path)
    for fold, state in (("official", "failed"), ("fold-1", "running")):
        spool = Spool(tmp_path / fold / "spool")
        save_run(tmp_path / fold / "spool", parent.uri, create_child(parent, fold))
        spool.state("RUNNING")
        spool.close()
        replay(tmp_path / fold / "spool", client, load_run(tmp_path / fold / "spool")[1])
        update_status(tmp_path, fold, state=state)
    assert left(tmp_path) == 0
    compare(tmp_path)
    ends = [client.get_run(load_run(tmp_path / fold / "spool")[1]).info.status for fold in ("official", "fold-1")]
    assert ends == ["FAILED", "RUNNING"]


def test_processes_of_another_machine_are_not_called_lost(tmp_path: Path) -> None:
    scheduler = {"pid": os.getpid(), "created": 0.0, "host": "elsewhere"}
    jobs = [{"fold": "official", "job": "1", "pid": os.getpid(), "created": 0.0}]
    write_json(tmp_path / "jobs.json", {"executor": "local", "folds": ["official"], "scheduler": scheduler, "jobs": jobs})
    update_status(tmp_path, "official", state="running")
    assert tracking.close_lost(tmp_path) == [] and read_status(tmp_path, "official")["state"] == "running"
    gone = {**read_json(tmp_path / "jobs.json"), "scheduler": {**scheduler, "host": os.uname().nodename}, "jobs": []}
    write_json(tmp_path / "jobs.json", {**gone, "jobs": [{"fold": "official", "job": "1", "pid": 2**22 + 1, "created": 0.0}]})
    assert tracking.close_lost(tmp_path) == ["official"]
    assert read_status(tmp_path, "official")["state"] == "failed" and read_status(tmp_path, "official")["reason"] == "job 1 is gone"
    assert tracking.close_lost(tmp_path / "gone") == []


def test_a_slurm_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    write_json(
        tmp_path / "jobs.json", {"executor": "slurm", "folds": ["official"], "array": "1", "jobs": [{"fold": "official", "job": "1"}]}
    )
    update_status(tmp_path, "official", state="running")
    with pytest.raises(UserError, match="squeue does not answer"):
        tracking.close_lost(tmp_path)
    assert read_status(tmp_path, "official")["state"] == "running"
