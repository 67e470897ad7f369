import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from array import array

import pytest

from jmt_dist.track.spool import EVENTS, WAITING, Spool, read_metrics, read_points, read_records


def records(folder):
    return [record for _, record in read_records(folder)]


def test_records_of_every_kind(tmp_path):
    spool = Spool(tmp_path / "fold" / "spool")
    spool.metrics({"fusion/loss": 1.5, "fusion/score": 0.25}, step=3)
    spool.params({"batch": 2, "name": "jmt"})
    spool.tags({"job": 17})
    spool.artifact(tmp_path / "fold" / "evaluate" / "plot.png", "plots")
    spool.artifact("/elsewhere/file.txt")
    spool.state("FINISHED")
    spool.close()
    got = records(tmp_path / "fold" / "spool")
    assert [sorted(set(r) - {"t"}) for r in got] == [["m", "s"], ["p"], ["g"], ["a", "to"], ["a", "to"], ["z"]]
    assert got[0]["m"] == {"fusion/loss": 1.5, "fusion/score": 0.25} and got[0]["s"] == 3
    assert got[1]["p"] == {"batch": "2", "name": "jmt"} and got[2]["g"] == {"job": "17"}
    assert (got[3]["a"], got[3]["to"]) == ("evaluate/plot.png", "plots")  # relative: the run folder may be moved
    assert got[4]["a"] == "/elsewhere/file.txt"
    assert abs(got[0]["t"] / 1000 - time.time()) < 60
    with pytest.raises(ValueError, match="DONE is none of"):
        spool.state("DONE")


def test_lines_are_strict_json_with_nan_and_infinity(tmp_path):
    spool = Spool(tmp_path)
    spool.metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e-300}, 0)
    spool.close()
    for line in (tmp_path / EVENTS).read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    curves = read_metrics(tmp_path)
    assert math.isnan(curves["a"][0][1]) and curves["b"] == [(0, math.inf)] and curves["c"] == [(0, -math.inf)]
    assert curves["d"] == [(0, 1e-300)]


def test_first_time_is_used_again_after_reopening(tmp_path):
    first = Spool(tmp_path)
    for step in range(6):
        first.metrics({"loss": 1.0 / (step + 1), "nan": math.nan}, step)
    first.close()
    times = {(name, step): t for name, step, t, _ in read_points(tmp_path)}
    time.sleep(0.01)
    again = Spool(tmp_path)  # a resume from the checkpoint of step 3
    again.metrics({"loss": 1.0 / 5, "nan": math.nan}, 4)  # the same value: not written again
    again.metrics({"loss": 0.75, "late": 9.0}, 5)  # another value, and a name that step did not have
    again.metrics({"loss": 0.5}, 6)
    again.close()
    points = list(read_points(tmp_path))
    assert len(points) == 12 + 3
    assert points[12:] == [("loss", 5, times["loss", 5], 0.75), ("late", 5, points[13][2], 9.0), ("loss", 6, points[14][2], 0.5)]
    assert points[13][2] > times["loss", 5] and points[14][2] > times["loss", 5]
    assert read_metrics(tmp_path)["loss"][-2:] == [(5, 0.75), (6, 0.5)]  # the last value of a step counts


def test_steps_out_of_order_keep_their_times(tmp_path):
    spool = Spool(tmp_path)
    for step in (5, 1, 3, 0, 9, 4):
        spool.metrics({"x": step}, step)
    before = list(read_points(tmp_path))
    for step in (4, 0, 9, 1, 5, 3):
        spool.metrics({"x": step}, step)
    assert list(read_points(tmp_path)) == before and [p[1] for p in before] == [5, 1, 3, 0, 9, 4]


def test_torn_last_line_is_ended_and_skipped(tmp_path):
    spool = Spool(tmp_path)
    spool.metrics({"x": 1.0}, 1)
    spool.close()
    with open(tmp_path / EVENTS, "ab") as file:
        file.write(b'{"t":17,"s":2,"m":{"x"')
    assert len(records(tmp_path)) == 1  # still being written, as far as a reader knows
    spool = Spool(tmp_path)
    spool.metrics({"x": 3.0}, 3)
    spool.close()
    assert [r and r["m"] for r in records(tmp_path)] == [{"x": 1.0}, None, {"x": 3.0}]


FOREIGN = [b"[]", b'{"t":1}', b'{"s":1,"m":{"x":1}}', b'{"t":1,"s":1,"m":{"x":"high"}}', b'{"t":1,"m":{"x":1}}', b"\xff\xfe", b""]


@pytest.mark.parametrize("line", FOREIGN)
def test_foreign_lines_are_skipped(tmp_path, line):
    (tmp_path / EVENTS).write_bytes(line + b"\n" + b'{"t":1,"s":2,"m":{"x":3}}\n')
    assert records(tmp_path) == [None, {"t": 1, "s": 2, "m": {"x": 3.0}}]
    assert read_metrics(tmp_path) == {"x": [(2, 3.0)]}
    Spool(tmp_path).metrics({"x": 4.0}, 4)
    assert read_metrics(tmp_path) == {"x": [(2, 3.0), (4, 4.0)]}


def test_threads_write_whole_lines(tmp_path):
    spool = Spool(tmp_path)

    def work(index):
        for step in range(300):
            spool.metrics({f"m{index}": step, "shared": step}, step)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    spool.close()
    assert None not in records(tmp_path)
    curves = read_metrics(tmp_path)
    assert all(curves[f"m{i}"] == [(s, s) for s in range(300)] for i in range(8))
    assert sum(name == "shared" for name, *_ in read_points(tmp_path)) == 300


def test_disk_errors_never_raise_and_nothing_is_lost_when_they_pass(tmp_path):
    blocked = tmp_path / "spool"
    blocked.write_text("a file where the folder should be")
    spool = Spool(blocked)
    for step in range(50):
        spool.metrics({"x": step}, step)
    assert spool.problem and not spool.dropped
    blocked.unlink()
    spool.metrics({"x": 50}, 50)
    spool.close()
    assert read_metrics(blocked)["x"] == [(s, s) for s in range(51)] and spool.dropped == 0


def test_what_the_disk_never_takes_is_counted(tmp_path):
    blocked = tmp_path / "spool"
    blocked.write_text("a file where the folder should be")
    spool = Spool(blocked)
    for step in range(WAITING + 7):
        spool.metrics({"x": step}, step)
    assert spool.dropped == 7
    spool.close()
    assert spool.dropped == WAITING + 7 and "File exists" in spool.problem


FULL_DISK = """
import resource, signal, sys
from jmt_dist.track.spool import Spool
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # writes stop half-way through a line
spool = Spool(Path(sys.argv[1]))
for step in range(100):
    spool.metrics({"x": step}, step)
assert "large" in spool.problem, spool.problem
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
spool.metrics({"x": 100}, 100)
spool.close()
assert spool.dropped == 0
"""


def test_a_disk_that_fills_up_half_way_through_a_line(tmp_path):
    subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], check=True)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert read_metrics(tmp_path)["x"] == [(s, s) for s in range(101)]
    assert records(tmp_path).count(None) == 1  # the torn line


def test_values_that_are_no_numbers_are_counted_not_raised(tmp_path):
    spool = Spool(tmp_path)
    spool.metrics({"good": 1.0, "bad": None, "worse": "high", "bool": True}, 0)
    assert spool.dropped == 2 and "worse" in spool.problem
    assert set(read_metrics(tmp_path)) == {"good", "bool"}


def test_no_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spool = Spool(None)
    spool.metrics({"x": 1.0}, 0)
    spool.params({"a": 1})
    spool.artifact(tmp_path)
    spool.state("RUNNING")
    spool.close()
    assert not list(tmp_path.iterdir())


WRITER = """
import sys
from pathlib import Path
from jmt_dist.track.spool import Spool
spool = Spool(Path(sys.argv[1]))
for step in range(int(sys.argv[2]), 10_000_000):
    spool.metrics({f"a_rather_long_metric_name_{i}": step + i / 10 for i in range(40)}, step)
"""


def test_killed_writer_leaves_a_spool_that_goes_on(tmp_path):
    start = 0
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(start)])
        size, deadline = (tmp_path / EVENTS).stat().st_size if start else 0, time.monotonic() + 30
        while time.monotonic() < deadline and (not (tmp_path / EVENTS).exists() or (tmp_path / EVENTS).stat().st_size < size + 100_000):
            time.sleep(0.01)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        steps = [step for step, _ in read_metrics(tmp_path)["a_rather_long_metric_name_0"]]
        assert steps == list(range(len(steps))) and len(steps) > start
        start = len(steps) - 2  # resume before the last checkpoint
    spool = Spool(tmp_path)
    spool.metrics({"end": 1.0}, 0)
    spool.close()
    assert read_metrics(tmp_path)["end"] == [(0, 1.0)]
    points = [(name, step) for name, step, _, _ in read_points(tmp_path)]
    assert len(points) == len(set(points))


TWICE = """
import sys
from pathlib import Path
from jmt_dist.track.spool import Spool
spool = Spool(Path(sys.argv[1]))
for step in range(3_000):
    spool.metrics({f"{sys.argv[2]}/{i}": step for i in range(20)}, step)
spool.close()
"""


def test_a_second_start_while_the_first_still_writes_mixes_no_lines(tmp_path):
    jobs = [subprocess.Popen([sys.executable, "-c", TWICE, str(tmp_path), name]) for name in ("first", "second")]
    assert [job.wait(timeout=60) for job in jobs] == [0, 0]
    assert None not in records(tmp_path)
    curves = read_metrics(tmp_path)
    assert len(curves) == 40 and all(curve == [(step, step) for step in range(3_000)] for curve in curves.values())


def test_a_million_points_fit_in_memory():
    from jmt_dist.track.spool import _Points

    points = _Points()
    started = time.perf_counter()
    for step in range(1_000_000):
        points.place(step, step, 0.5)
    assert time.perf_counter() - started < 30
    assert isinstance(points.steps, array) and sum(a.itemsize * len(a) for a in (points.steps, points.times, points.values)) == 24_000_000
