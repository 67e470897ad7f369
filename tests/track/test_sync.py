import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jmt_dist.config import Recipe
from jmt_dist.errors import UserError
from jmt_dist.recipe import build, dump, word_layer
from jmt_dist.track.spool import Spool
from jmt_dist.track.sync import finished, left, sync
from jmt_dist.track.tracker import ParentRun, connect, create_child, load_run, save_run

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "launch" / "sync_tracking.py")


@pytest.fixture
def run(template, tmp_path):
    """A run folder of two folds that only spooled, beside an empty store."""
    shutil.copy(template[0] / "mlflow.db", tmp_path / "mlflow.db")
    out = tmp_path / "paper"
    out.mkdir()
    dump(build(Recipe, [word_layer("name=paper"), word_layer("fusion.batch=4")]), out / "recipe.yaml")
    for index, fold in enumerate(("official", "fold-1")):
        spool = Spool(out / fold / "spool")
        spool.state("RUNNING")
        for step in range(10):
            spool.metrics({"fusion/loss": step + index}, step)
        spool.close()
    return out


def history(client, run_id):
    return [(m.step, m.value) for m in client.get_metric_history(run_id, "fusion/loss")]


def test_a_spool_without_a_run_gets_one(run, tmp_path):
    folds = sync(run)
    assert [(f.fold, f.report.metrics, f.report.left, f.problem) for f in folds] == [("fold-1", 10, 0, ""), ("official", 10, 0, "")]
    parent = ParentRun.load(run)
    assert parent.uri == f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(parent.uri)
    assert client.get_experiment(parent.experiment_id).name == "paper"
    assert client.get_run(parent.run_id).data.params["fusion.batch"] == "4"
    children = client.search_runs([parent.experiment_id], f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert {c.info.run_id: c.info.run_name for c in children} == {f.run_id: f"paper/{f.fold}" for f in folds}
    assert [load_run(run / f.fold / "spool") for f in folds] == [("", f.run_id) for f in folds]
    again = sync(run)
    assert [f.run_id for f in again] == [f.run_id for f in folds] and not any(f.report.sent for f in again)
    assert history(client, folds[0].run_id) == [(s, s + 1.0) for s in range(10)]
    assert len(client.search_runs([parent.experiment_id])) == 3 and left(run) == 0


def test_jobs_that_only_spool_keep_doing_so(run, store):
    client, parent = store
    parent.save(run)
    child = create_child(parent, "official")
    save_run(run / "official" / "spool", "", child)
    folds = {f.fold: f for f in sync(run)}
    assert folds["official"].run_id == child and len(history(client, child)) == 10
    assert load_run(run / "official" / "spool") == ("", child)  # no uri: a restarted job does not open SQLite by itself
    assert load_run(run / "fold-1" / "spool") == ("", folds["fold-1"].run_id)
    Spool(run / "official" / "spool").metrics({"fusion/loss": 0.0}, 10)
    assert left(run) == 1 and [f.report.metrics for f in sync(run)] == [0, 1]


@pytest.mark.parametrize(("state", "status"), [("failed", "FAILED"), ("stopped", "KILLED"), ("done", "FINISHED"), ("running", "RUNNING")])
def test_a_job_that_was_killed_is_closed_by_its_status(run, state, status):
    for fold in ("official", "fold-1"):
        (run / fold / "status.json").write_text(json.dumps({"state": state}))
    folds = sync(run)
    client = connect(ParentRun.load(run).uri)
    assert {client.get_run(f.run_id).info.status for f in folds} == {status}
    assert finished(run) == (state != "running")
    Spool(run / "official" / "spool").state("RUNNING")  # the job is started again
    (run / "official" / "status.json").write_text(json.dumps({"state": "running"}))
    by_fold = {f.fold: client.get_run(f.run_id).info.status for f in sync(run)}
    assert by_fold == {"official": "RUNNING", "fold-1": status}


def test_a_run_that_the_store_does_not_have_is_named(run, store):
    _, parent = store
    parent.save(run)
    save_run(run / "official" / "spool", parent.uri, "0" * 32)
    by_fold = {f.fold: f for f in sync(run)}
    lost = by_fold["official"]
    assert lost.report.left == 11 and "is not in sqlite" in lost.problem and "run.json" in lost.problem
    assert by_fold["fold-1"].report.metrics == 10 and not by_fold["fold-1"].problem  # the other fold is stored all the same


def test_nothing_to_send_and_no_store_are_one_line(run, tmp_path):
    with pytest.raises(UserError, match="has no spools"):
        sync(tmp_path / "gone")
    (tmp_path / "broken.db").write_bytes(b"no database " * 200)
    with pytest.raises(UserError, match="cannot be used"):
        sync(run, f"sqlite:///{tmp_path}/broken.db")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1 cannot be used"):
        sync(run, "http://127.0.0.1:1")
    assert left(run) == 22


def test_program_watches_until_all_folds_are_done(run):
    command = [sys.executable, PROGRAM, f"out={run}", "watch=true", "every=0.2"]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while left(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left(run) == 0 and watcher.poll() is None
    for fold in ("official", "fold-1"):
        spool = Spool(run / fold / "spool")
        spool.metrics({"fusion/loss": 0.5}, 10)
        spool.state("FINISHED")
        spool.close()
        (run / fold / "status.json").write_text(json.dumps({"state": "done"}))
    out, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 0, err
    assert out.splitlines()[0] == f"sending the spools of {run}" and out.splitlines()[-1] == f"{run}: everything is stored"
    assert "official: 10 sent," in out and "official: 1 sent," in out  # what is left then depends on when it counts
    client = connect(ParentRun.load(run).uri)
    for fold in ("official", "fold-1"):
        child = load_run(run / fold / "spool")[1]
        assert len(history(client, child)) == 11 and client.get_run(child).info.status == "FINISHED"


def test_program_says_what_is_left(run, store):
    _, parent = store
    parent.save(run)
    for fold in ("official", "fold-1"):
        save_run(run / fold / "spool", "", "0" * 32)
    done = subprocess.run([sys.executable, PROGRAM, f"out={run}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and done.stdout.splitlines()[-1] == f"{run}: 22 records are left"
