import json
import math
import subprocess
import sys

import pytest

from jmt_dist.track.replay import METRICS_PER_CALL, OFFSET, replay, unsent
from jmt_dist.track.spool import EVENTS, Spool
from jmt_dist.track.tracker import create_child


def history(client, run_id, name):
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))


@pytest.fixture
def child(store):
    client, parent = store
    return client, create_child(parent, "fold-1")


def test_everything_arrives_once_however_often_it_is_sent(child, tmp_path):
    client, run_id = child
    folder = tmp_path / "fold-1" / "spool"
    plot = tmp_path / "fold-1" / "plot.txt"
    plot.parent.mkdir()
    plot.write_text("first")
    spool = Spool(folder)
    spool.state("RUNNING")
    spool.params({"batch": 2, **{f"p{i}": i for i in range(250)}})
    spool.tags({"job": 17, "other": "a"})
    spool.tags({"job": 18})
    for step in range(2_000):
        spool.metrics({"loss": 1 / (step + 1), "lr": 1e-3}, step)
    spool.metrics({"odd": math.nan, "up": math.inf, "down": -math.inf}, 0)
    spool.artifact(plot, "plots")
    spool.artifact(plot, "plots")
    spool.artifact(tmp_path / "fold-1" / "gone.png")
    assert unsent(folder, run_id) == 2_008
    first = replay(folder, client, run_id)
    assert (first.metrics, first.params, first.tags, first.artifacts, first.state) == (4_003, 251, 2, 1, "RUNNING")
    assert first.left == 0 and first.missing == ("gone.png",) and not first.refused
    assert replay(folder, client, run_id).sent == 0
    (folder / OFFSET).unlink()  # from the beginning
    whole = replay(folder, client, run_id)
    assert whole.metrics == 4_003 and whole.params == 0 and not whole.refused
    assert history(client, run_id, "loss") == [(s, 1 / (s + 1)) for s in range(2_000)]
    assert len(history(client, run_id, "lr")) == 2_000
    assert math.isnan(history(client, run_id, "odd")[0][1]) and len(history(client, run_id, "odd")) == 1
    assert history(client, run_id, "up") == [(0, sys.float_info.max)]  # MLflow's way with infinities
    assert history(client, run_id, "down") == [(0, -sys.float_info.max)]
    run = client.get_run(run_id)
    assert run.data.params["batch"] == "2" and run.data.params["p249"] == "249"
    assert run.data.tags["job"] == "18" and run.data.tags["other"] == "a" and run.info.status == "RUNNING"
    assert [f.path for f in client.list_artifacts(run_id, "plots")] == ["plots/plot.txt"]


def test_calls_hold_at_most_900_metrics(child, tmp_path, monkeypatch):
    client, run_id = child
    sizes = []
    send = client.log_batch
    monkeypatch.setattr(client, "log_batch", lambda run, **kind: (sizes.append({k: len(v) for k, v in kind.items()}), send(run, **kind)))
    spool = Spool(tmp_path / "spool")
    spool.metrics({f"m{i}": i for i in range(2_500)}, 0)  # one record above the limit
    for step in range(1_000):
        spool.metrics({"x": step}, step)
    report = replay(tmp_path / "spool", client, run_id)
    assert report.metrics == sum(s["metrics"] for s in sizes) == 3_500
    assert max(s["metrics"] for s in sizes) <= METRICS_PER_CALL and len(sizes) <= 6
    assert len(history(client, run_id, "x")) == 1_000 and history(client, run_id, "m2499") == [(0, 2499.0)]


def test_a_resumed_run_has_no_second_points(child, tmp_path):
    client, run_id = child
    folder = tmp_path / "spool"
    for start in (0, 3, 5):  # each resumes before where the last one stopped
        spool = Spool(folder)
        spool.state("RUNNING")
        for step in range(start, start + 4):
            spool.metrics({"loss": step / 7}, step)
        spool.state("KILLED" if start < 5 else "FINISHED")
        spool.close()
        replay(folder, client, run_id)
        assert client.get_run(run_id).info.status == ("KILLED" if start < 5 else "FINISHED")
    assert history(client, run_id, "loss") == [(s, s / 7) for s in range(9)]
    times = [m.timestamp for m in client.get_metric_history(run_id, "loss")]
    assert times == sorted(times)


def test_a_changed_value_shares_the_time_of_its_step(child, tmp_path):
    client, run_id = child
    for value in (0.5, 0.25):
        spool = Spool(tmp_path / "spool")
        spool.metrics({"loss": value}, 3)
        spool.close()
        replay(tmp_path / "spool", client, run_id)
    points = client.get_metric_history(run_id, "loss")
    assert {p.value for p in points} == {0.5, 0.25} and len({p.timestamp for p in points}) == 1


def test_what_the_server_refuses_does_not_hold_back_the_rest(child, tmp_path):
    client, run_id = child
    spool = Spool(tmp_path / "spool")
    spool.params({"batch": 2})
    replay(tmp_path / "spool", client, run_id)
    spool.params({"batch": 4, "seed": 1})  # a parameter cannot be changed
    for step in range(20):
        spool.metrics({"good": step, "../bad": step, "brackets[0]": step}, step)
    report = replay(tmp_path / "spool", client, run_id)
    assert report.metrics == 40 and report.left == 0 and report.params == 1
    assert sum("../bad" in line for line in report.refused) == 20 and "param batch: stays 2" in report.refused
    assert len(history(client, run_id, "good")) == len(history(client, run_id, "brackets_0_")) == 20
    assert client.get_run(run_id).data.params == {"batch": "2", "seed": "1"}


def test_torn_lines_are_skipped_and_counted(child, tmp_path):
    client, run_id = child
    folder = tmp_path / "spool"
    for step in range(2):
        spool = Spool(folder)
        spool.metrics({"x": step}, step)
        spool.close()
        with open(folder / EVENTS, "ab") as file:
            file.write(b'{"t":1,"s":1,"m":{')
        report = replay(folder, client, run_id)
    assert report.unreadable == 1 and report.left == 0
    assert history(client, run_id, "x") == [(0, 0.0), (1, 1.0)]


def test_an_error_keeps_the_offset(child, tmp_path):
    client, run_id = child
    folder = tmp_path / "spool"
    spool = Spool(folder)
    for step in range(2_000):
        spool.metrics({"x": step}, step)

    class Failing:
        calls = 0
        get_run = staticmethod(client.get_run)

        def log_batch(self, *args, **kind):
            Failing.calls += 1
            if Failing.calls == 2:
                raise ConnectionError("gone")
            client.log_batch(*args, **kind)

    with pytest.raises(ConnectionError):
        replay(folder, Failing(), run_id)
    assert unsent(folder, run_id) == 2_000 - METRICS_PER_CALL
    assert replay(folder, client, run_id).metrics == 2_000 - METRICS_PER_CALL
    assert len(history(client, run_id, "x")) == 2_000


def test_a_deleted_run_takes_nothing_and_loses_nothing(child, tmp_path):
    client, run_id = child
    folder = tmp_path / "spool"
    Spool(folder).metrics({"x": 1.0}, 0)
    client.delete_run(run_id)
    with pytest.raises(RuntimeError, match="is deleted"):
        replay(folder, client, run_id)
    assert unsent(folder, run_id) == 1
    client.restore_run(run_id)
    assert replay(folder, client, run_id).metrics == 1


def test_an_offset_of_another_run_or_a_longer_file_is_not_believed(store, tmp_path):
    client, parent = store
    one, two = create_child(parent, "fold-1"), create_child(parent, "fold-2")
    folder = tmp_path / "spool"
    Spool(folder).metrics({"x": 1.0}, 0)
    assert replay(folder, client, one).metrics == replay(folder, client, two).metrics == 1
    (folder / OFFSET).write_text(json.dumps({"run_id": two, "position": 10_000, "artifacts": 10_000}))
    assert replay(folder, client, two).metrics == 1
    (folder / OFFSET).write_text("not json")
    assert replay(folder, client, two).metrics == 1
    assert history(client, one, "x") == history(client, two, "x") == [(0, 1.0)]


def test_empty_folder(child, tmp_path):
    client, run_id = child
    assert replay(tmp_path, client, run_id).sent == 0 and unsent(tmp_path, run_id) == 0


WRITE_AND_SEND = """
import sys
from pathlib import Path
from jmt_dist.track.spool import Spool
from jmt_dist.track.replay import replay
from jmt_dist.track.tracker import connect
uri, own_run, own, shared_run, shared = sys.argv[1:]
client, spool, mine, common = connect(uri), Spool(Path(own)), 0, 0
for step in range(600):
    spool.metrics({"loss": step, "score": step / 2}, step)
    if step % 60 == 59:
        mine += replay(Path(own), client, own_run).metrics
        common += replay(Path(shared), client, shared_run).metrics
print(mine, common)
"""


def test_two_processes_send_at_once_their_own_and_the_same_spool(store, tmp_path):
    client, parent = store
    runs = [create_child(parent, fold) for fold in ("fold-1", "fold-2", "fold-3")]
    shared = Spool(tmp_path / runs[2])
    for step in range(3_000):
        shared.metrics({"loss": step, "score": step / 2}, step)
    jobs = []
    for run in runs[:2]:
        command = [sys.executable, "-c", WRITE_AND_SEND, parent.uri, run, str(tmp_path / run), runs[2], str(tmp_path / runs[2])]
        jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    counts = [[int(word) for word in out.split()] for out, _ in outputs]
    assert [own for own, _ in counts] == [1_200, 1_200]
    assert sum(common for _, common in counts) == 6_000  # the lock keeps them from sending anything twice
    for run, steps in zip(runs, (600, 600, 3_000), strict=True):
        assert history(client, run, "loss") == [(s, float(s)) for s in range(steps)]
        assert history(client, run, "score") == [(s, s / 2) for s in range(steps)]
