import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from jmt_dist.errors import UserError
from jmt_dist.track.replay import replay, unsent
from jmt_dist.track.spool import Spool, read_metrics, read_records
from jmt_dist.track.tracker import (
    CLIENT_ENVIRONMENT,
    CLOSE_SECONDS,
    SQLITE,
    ParentRun,
    Tracker,
    connect,
    create_child,
    create_experiment,
    flatten,
    load_run,
    save_run,
)
from jmt_dist.train.stop import Stopped


def history(client, run_id, name):
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))


def states(folder):
    return [record["z"] for _, record in read_records(folder) if record and "z" in record]


def test_parent_and_children(store, tmp_path):
    client, parent = store
    run = client.get_run(parent.run_id)
    assert run.data.params == {"seed": "0"} and run.data.tags["kind"] == "folds"
    again = create_experiment(parent.uri, "demo", {}, {"fusion": {"batch": 2, "seeds": [0, 1], "jmt": {"joint": True}}, "name": "demo"})
    assert again.experiment_id == parent.experiment_id and again.run_id != parent.run_id
    params = client.get_run(again.run_id).data.params
    assert params == {"fusion.batch": "2", "fusion.seeds": "[0, 1]", "fusion.jmt.joint": "true", "name": "demo"}
    child = create_child(again, "fold-2", {"host": "here"}, {"rows": 3})
    tags = client.get_run(child).data.tags
    assert (tags["mlflow.parentRunId"], tags["fold"], tags["host"]) == (again.run_id, "fold-2", "here")
    found = client.search_runs([again.experiment_id], f"tags.mlflow.parentRunId = '{again.run_id}'")
    assert [r.info.run_id for r in found] == [child] and found[0].info.run_name == "fold-2"
    again.save(tmp_path)
    assert ParentRun.load(tmp_path) == again and ParentRun.load(tmp_path / "none") is None
    save_run(tmp_path / "fold-2" / "spool", again.uri, child)
    assert load_run(tmp_path / "fold-2" / "spool") == (again.uri, child) and load_run(tmp_path) == ("", "")
    (tmp_path / "parent_run.json").write_text("{")
    with pytest.raises(UserError, match=r"parent_run\.json cannot be read"):
        ParentRun.load(tmp_path)


def test_deleted_experiment_and_broken_file_give_one_line(store, tmp_path):
    client, parent = store
    client.delete_experiment(parent.experiment_id)
    with pytest.raises(UserError, match=r"experiment `demo` was deleted .* mlflow experiments restore --experiment-id 1"):
        create_experiment(parent.uri, "demo", {}, {})
    (tmp_path / "broken.db").write_text("this is no database " * 100)
    with pytest.raises(UserError, match=r"cannot be used: .*not a database"):
        create_experiment(f"{SQLITE}{tmp_path}/broken.db", "demo", {}, {})


def test_unreachable_server_is_one_line_soon(tmp_path):
    started = time.monotonic()
    with pytest.raises(UserError, match=r"tracking store http://127\.0\.0\.1:1 cannot be used"):
        create_experiment("http://127.0.0.1:1", "demo", {}, {})
    assert time.monotonic() - started < 30
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ  # the short timeouts are ours alone


def test_environment_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with Tracker(tmp_path / "fold-1" / "spool"):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77" and "GIT_PYTHON_REFRESH" not in os.environ


def test_a_run_arrives_while_and_after_it_trains(store, tmp_path):
    client, parent = store
    run_id, folder = create_child(parent, "fold-1"), tmp_path / "fold-1" / "spool"
    with Tracker(folder, parent.uri, run_id) as tracker:
        tracker.spool.metrics({"loss": 2.0}, 0)
        deadline = time.monotonic() + 30
        while not history(client, run_id, "loss") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert history(client, run_id, "loss") == [(0, 2.0)] and client.get_run(run_id).info.status == "RUNNING"
        tracker.spool.metrics({"loss": 1.0}, 1)
    assert history(client, run_id, "loss") == [(0, 2.0), (1, 1.0)]
    assert client.get_run(run_id).info.status == "FINISHED" and unsent(folder, run_id) == 0
    with pytest.raises(RuntimeError), Tracker(folder, parent.uri, run_id) as tracker:  # a resume goes on with the same run
        tracker.spool.metrics({"loss": 1.0}, 1)
        tracker.spool.metrics({"loss": 0.5}, 2)
        raise RuntimeError("out of memory")
    assert history(client, run_id, "loss") == [(0, 2.0), (1, 1.0), (2, 0.5)]
    assert client.get_run(run_id).info.status == "FAILED"
    with pytest.raises(Stopped), Tracker(folder, parent.uri, run_id):  # what training raises after it saved on request
        raise Stopped("preempted")
    assert client.get_run(run_id).info.status == "SCHEDULED"
    with Tracker(folder, parent.uri, run_id):
        pass
    assert client.get_run(run_id).info.status == "FINISHED" and unsent(folder, run_id) == 0


class Odd(Exception):  # noqa: N818
    tracking_state = "GONE"


ENDINGS = [
    (None, "FINISHED"),
    (ValueError, "FAILED"),
    (KeyboardInterrupt, "KILLED"),
    (SystemExit, "KILLED"),
    (Stopped, "SCHEDULED"),
    (Odd, "FAILED"),
]


@pytest.mark.parametrize(("error", "state"), ENDINGS)
def test_state_at_the_end_without_a_store(tmp_path, error, state):
    folder = tmp_path / "fold-1" / "spool"
    try:
        with Tracker(folder) as tracker:
            tracker.spool.metrics({"x": 1.0}, 0)
            if error:
                raise error
    except BaseException as caught:
        assert type(caught) is error
    assert states(folder) == ["RUNNING", state] and read_metrics(folder) == {"x": [(0, 1.0)]}


def test_other_ranks_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = threading.active_count()
    with Tracker(None, "http://127.0.0.1:1", "run") as tracker:
        tracker.spool.metrics({"x": 1.0}, 0)
        assert threading.active_count() == threads
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hanging():
    """A socket that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def refused():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["refused", "hanging"])
def test_a_dead_server_slows_nothing_and_loses_nothing(kind, store, tmp_path, hanging, capfd, monkeypatch):
    monkeypatch.setattr("jmt_dist.track.tracker.INTERVAL_SECONDS", 0.2)  # several attempts within the test
    monkeypatch.setitem(CLIENT_ENVIRONMENT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    client, parent = store
    folder = tmp_path / "fold-1" / "spool"
    slowest = 0.0
    with Tracker(folder, hanging if kind == "hanging" else refused(), "0123456789abcdef0123456789abcdef") as tracker:
        for step in range(1_500):
            before = time.perf_counter()
            tracker.spool.metrics({"loss": 1 / (step + 1), "score": step}, step)
            slowest = max(slowest, time.perf_counter() - before)
            time.sleep(0.001)
        if kind == "refused":
            assert tracker.problem  # an attempt has failed meanwhile; the hanging one is still waiting
        started = time.monotonic()
    assert time.monotonic() - started < CLOSE_SECONDS + 2
    assert slowest < 1.0  # one core shared with the shipper; a call to the hanging server takes 2 s
    said = capfd.readouterr().err
    assert f"1502 records wait in {folder}" in said and f"python launch/sync_tracking.py out={tmp_path} sends them" in said
    run_id = create_child(parent, "fold-1")
    deadline = time.monotonic() + 30
    while (report := replay(folder, client, run_id)).busy and time.monotonic() < deadline:
        time.sleep(0.1)  # the shipper of this same process still waits for the hanging server; in a job it ends with the process
    assert report.metrics == 3_000
    assert history(client, run_id, "loss") == [(s, 1 / (s + 1)) for s in range(1_500)]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_no_attempt_is_made_after_close(tmp_path, monkeypatch):
    monkeypatch.setattr("jmt_dist.track.tracker.INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr("jmt_dist.track.tracker.CLOSE_SECONDS", 0.5)
    answer, calls = threading.Event(), []

    def hang(*_):
        calls.append(time.monotonic())
        answer.wait(30)
        raise ConnectionError("no answer")

    monkeypatch.setattr("jmt_dist.track.tracker.replay", hang)
    with Tracker(tmp_path / "fold-1" / "spool", "http://127.0.0.1:1", "0" * 32) as tracker:
        deadline = time.monotonic() + 30
        while not calls and time.monotonic() < deadline:
            time.sleep(0.01)
    assert tracker._thread.is_alive() and os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"  # its call keeps the short timeouts
    answer.set()
    tracker._thread.join(timeout=30)
    assert not tracker._thread.is_alive() and len(calls) == 1
    tracker._environment.close()


HOLDS = """
import json, sys, threading, time
from pathlib import Path
import psutil
from jmt_dist.track.tracker import Tracker
seen = []
with Tracker(Path(sys.argv[1]), sys.argv[2], "0123456789abcdef0123456789abcdef") as tracker:
    sys.addaudithook(lambda event, _: seen.append((event, threading.get_ident())) if event.startswith("socket.") else None)
    while ("socket.connect", tracker._thread.ident) not in seen:  # the shipper has asked, and will wait for ever
        time.sleep(0.02)
    for step in range(10_000):
        tracker.spool.metrics({"fusion/jmt-seed0/train/loss": step / 3}, step)
    mine = [event for event, thread in seen if thread == threading.get_ident()]
    connections = len(psutil.Process().net_connections())
    started = time.monotonic()
print(json.dumps({"mine": mine, "connections": connections, "close": time.monotonic() - started}))
"""


def test_ten_thousand_calls_and_the_end_do_not_wait_for_a_server_that_hangs(tmp_path, hanging):
    folder = tmp_path / "fold-1" / "spool"
    done = subprocess.run([sys.executable, "-c", HOLDS, str(folder), hanging], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["mine"] == []  # no call opened a socket, nor asked for a name; the hook does see the shipper's
    assert said["connections"] <= 2  # the shipper's one, and the one it may have given up
    assert said["close"] < 16 and "10002 records wait" in done.stderr and "Traceback" not in done.stderr
    assert read_metrics(folder) == {"fusion/jmt-seed0/train/loss": [(step, step / 3) for step in range(10_000)]}


class Flaky(http.server.BaseHTTPRequestHandler):
    """Answers every call with 503: a proxy whose MLflow is away."""

    calls = 0

    def do_POST(self):
        type(self).calls += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(503)
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *args):
        pass


def test_a_server_in_trouble_is_asked_ever_more_rarely(tmp_path, monkeypatch):
    monkeypatch.setattr("jmt_dist.track.tracker.INTERVAL_SECONDS", 0.05)
    connect("http://127.0.0.1:1")  # imports MLflow, which would else take up the test's time
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path / "fold-1" / "spool"
    with Tracker(folder, f"http://127.0.0.1:{server.server_port}", "0123456789abcdef0123456789abcdef") as tracker:
        tracker.spool.metrics({"x": 1.0}, 0)
        time.sleep(2)
    server.shutdown()
    server.server_close()
    assert 4 <= Flaky.calls <= 20  # 0.05, 0.1, 0.2, … s apart: 6 attempts of two calls; without growing pauses, over 50
    assert "503" in tracker.problem
    assert read_metrics(folder) == {"x": [(0, 1.0)]}


CREATE = """
import sys, json
from jmt_dist.track.tracker import create_child, create_experiment
parent = create_experiment(sys.argv[1], "race", {}, {"a": 1})
print(json.dumps([parent.experiment_id, create_child(parent, "official")]))
"""


def test_two_processes_create_the_same_new_store(tmp_path):
    uri = f"{SQLITE}{tmp_path}/new/mlflow.db"
    command = [sys.executable, "-c", CREATE, uri]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    experiments, runs = zip(*(json.loads(out) for out, _ in outputs), strict=True)
    client = connect(uri)
    assert len(set(experiments)) == 1 and len(set(runs)) == 2
    assert len(client.search_runs([experiments[0]])) == 4  # two parents, two children
    assert client.get_experiment(experiments[0]).artifact_location == (tmp_path / "new" / "artifacts").as_uri()
    assert [err for _, err in outputs] == ["", ""]  # no migration chatter


def test_flatten():
    assert flatten({"a": {"b": {"c": 1.5}, "d": {}}, "e": None, "f": "x"}) == {"a.b.c": "1.5", "a.d": "{}", "e": "null", "f": "x"}


def test_a_spool_started_without_a_store_is_sent_later(store, tmp_path):
    client, parent = store
    folder = tmp_path / "fold-3" / "spool"
    with Tracker(folder) as tracker:
        tracker.spool.metrics({"x": 1.0}, 0)
    run_id = create_child(parent, "fold-3")
    with Tracker(folder, parent.uri, run_id) as tracker:  # the first attempt already sends what was there
        pass
    assert history(client, run_id, "x") == [(0, 1.0)] and isinstance(tracker.spool, Spool)
