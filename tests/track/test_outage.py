"""Six folds log while their server is killed, restarted and hung: every metric is stored once (slow tier)."""

import json
import signal
import subprocess
import sys
import time

import pytest

from jmt_dist.track.replay import OFFSET, unsent
from jmt_dist.track.spool import EVENTS
from jmt_dist.track.sync import left, sync
from jmt_dist.track.tracker import connect, create_child, create_experiment, save_run
from tests.track.server import Server

FOLDS = ("official", "fold-1", "fold-2", "fold-3", "fold-4", "fold-5")
NAME, STEPS = "fusion/jmt-seed0/train/loss", 10_000
FOLD = """
import os, sys, time
from pathlib import Path
from jmt_dist.track import tracker as t
t.INTERVAL_SECONDS, t.SLOWEST_SECONDS = 0.5, 2.0  # many attempts within the test
out, fold = Path(sys.argv[1]), sys.argv[2]
spool = out / fold / "spool"
with t.Tracker(spool, *t.load_run(spool)) as tracker:
    for step in range(int(sys.argv[3])):
        while (step == 3_000 and not (out / "killed").exists()) or (step == 6_000 and not (out / "back").exists()):
            time.sleep(0.05)
        tracker.spool.metrics({sys.argv[4]: step / 3}, step)
        time.sleep(0.0005)
    (out / fold / "note.txt").write_text("written while the server hangs")
    tracker.spool.params({"late": 1})
    tracker.spool.tags({"end": "reached"})
    tracker.spool.artifact(out / fold / "note.txt", "notes")
"""


def until(what, seconds=400):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def recorded(out, fold):
    path = out / fold / "spool" / EVENTS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stored(out, fold):
    path = out / fold / "spool" / OFFSET
    return json.loads(path.read_text())["position"] if path.exists() else 0


@pytest.fixture
def server():
    found = Server("store=postgresql")
    yield found.start()
    found.remove()


@pytest.mark.server
@pytest.mark.kill
@pytest.mark.timeout(1800)  # a minute and a half on an idle machine; nothing here may depend on how busy it is
def test_sixty_thousand_metrics_survive_a_server_killed_restarted_and_hung(server, tmp_path):
    parent = create_experiment(server.uri, "outage", {}, {"seed": 0})
    parent.save(tmp_path)
    runs = {fold: create_child(parent, fold) for fold in FOLDS}
    for fold, run_id in runs.items():
        save_run(tmp_path / fold / "spool", server.uri, run_id)
    jobs = [subprocess.Popen([sys.executable, "-c", FOLD, str(tmp_path), fold, str(STEPS), NAME], stderr=subprocess.PIPE) for fold in FOLDS]

    until(lambda: all(stored(tmp_path, fold) for fold in FOLDS))  # each has sent a part
    code, words = server.kill()
    assert code == 1 and "the server has ended with exit code -9" in words
    (tmp_path / "killed").touch()
    until(lambda: all(recorded(tmp_path, fold) > 6_000 for fold in FOLDS))  # 3,000 each without a server
    before = {fold: stored(tmp_path, fold) for fold in FOLDS}
    server.start()  # the same command on the same folder
    until(lambda: all(stored(tmp_path, fold) > before[fold] for fold in FOLDS))  # they go on by themselves
    (tmp_path / "back").touch()
    until(lambda: all(recorded(tmp_path, fold) > 6_100 for fold in FOLDS))
    server.send(signal.SIGSTOP)  # accepts, never answers
    assert all(job.poll() is None for job in jobs)
    errors = [job.communicate(timeout=400)[1].decode() for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 6, errors
    assert all("records wait in" in said for said in errors)
    assert all(recorded(tmp_path, fold) == STEPS + 5 for fold in FOLDS)
    waiting = sum(unsent(tmp_path / fold / "spool", run_id) for fold, run_id in runs.items())
    assert 0 < waiting < 6 * STEPS
    server.kill()
    server.start()

    reports = sync(tmp_path)
    assert not any(fold.problem for fold in reports) and left(tmp_path) == 0
    client = connect(server.uri)
    assert sum(check(client, run_id) for run_id in runs.values()) == 60_000
    (tmp_path / "fold-5" / "spool" / OFFSET).unlink()  # once more from the beginning: nothing is doubled
    assert sum(fold.report.metrics for fold in sync(tmp_path)) == STEPS
    assert check(client, runs["fold-5"]) == STEPS


def check(client, run_id):
    """How many points a run has, after a look at each."""
    points = sorted((point.step, point.value) for point in client.get_metric_history(run_id, NAME))
    assert points == [(step, step / 3) for step in range(STEPS)]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params, run.data.tags["end"]) == ("FINISHED", {"late": "1"}, "reached")
    assert [file.path for file in client.list_artifacts(run_id, "notes")] == ["notes/note.txt"]
    return len(points)
