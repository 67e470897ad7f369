"""Who may work in a fold's folder: real processes, one of them killed, one suspended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jmt_dist.cluster import lease
from jmt_dist.cluster.lease import Lease
from tests.cluster.conftest import ROOT
from tests.cluster.test_local import wait_for

# holds the lease, counts in a file that only one of them may write at a time, and ends when it is told to
OWNER = """
import sys, time
from pathlib import Path
from jmt_dist.cluster.lease import Lease
folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with Lease(folder, name, lambda who: print(f"waits for {who}", flush=True), beat=0.1, lease=2.0):
    print("has it", flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with (folder / "work").open("a") as file:
            file.write(name + "\\n")
        time.sleep(0.05)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    running: list[subprocess.Popen[str]] = []

    def begin(name: str, seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OWNER, str(tmp_path), name, str(seconds)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGCONT)
            process.kill()
        process.communicate()


def owner(folder: Path) -> str:
    path = folder / lease.FILE
    return json.loads(path.read_text())["owner"] if path.exists() else ""


def test_one_at_a_time_and_the_next_comes_when_the_first_is_done_or_dead(tmp_path: Path, start) -> None:
    first = start("first", 60)
    wait_for(lambda: owner(tmp_path) == "first")
    others = [start(f"other-{n}", 0.5) for n in range(3)]
    for process in others:
        assert process.stdout.readline().startswith("waits for first on ")
    assert set((tmp_path / "work").read_text().split()) == {"first"}
    first.kill()  # it gives nothing back; its death is seen, the lease need not run out
    first.wait()
    for process in others:
        assert process.wait(60) == 0
    order = (tmp_path / "work").read_text().split()
    changes = [name for place, name in enumerate(order) if place == 0 or order[place - 1] != name]
    assert len(changes) == 4 and set(changes) == {"first", "other-0", "other-1", "other-2"}  # nobody worked while another did
    assert not (tmp_path / lease.FILE).exists()


def test_an_owner_that_was_not_heard_of_is_replaced_and_ends_when_it_comes_back(tmp_path: Path, start) -> None:
    frozen = start("frozen", 60)
    wait_for(lambda: owner(tmp_path) == "frozen")
    beats = (tmp_path / lease.FILE).read_text()
    wait_for(lambda: (tmp_path / lease.FILE).read_text() != beats)
    time.sleep(0.02)  # between two beats: it does not hold the file lock
    os.kill(frozen.pid, signal.SIGSTOP)  # alive, but silent: as on a node that the others cannot reach
    start("second", 60)
    began = time.monotonic()
    wait_for(lambda: owner(tmp_path) == "second")
    assert time.monotonic() - began > 1.5
    os.kill(frozen.pid, signal.SIGCONT)
    assert frozen.wait(30) == 1
    assert "second on " in frozen.stderr.read() and owner(tmp_path) == "second"
    order = (tmp_path / "work").read_text().split()
    late = order[order.index("second") :]
    assert late.count("frozen") <= 5  # what it did between two beats after it woke


def test_another_machine_is_believed_until_its_lease_runs_out_by_our_clock(tmp_path: Path) -> None:
    record = {"owner": "job 7_1", "host": "far", "machine": "elsewhere", "pid": 1, "created": 0, "token": "t", "beats": 3}
    (tmp_path / lease.FILE).write_text(json.dumps(record | {"time": "2099-01-01T00:00:00+00:00"}))  # its clock says nothing
    said: list[str] = []
    began = time.monotonic()
    with Lease(tmp_path, "mine", said.append, beat=0.1, lease=1.0):
        assert time.monotonic() - began >= 1.0 and said == ["job 7_1 on far"]
        assert owner(tmp_path) == "mine"
        taken = json.loads((tmp_path / lease.FILE).read_text())["beats"]
        wait_for(lambda: json.loads((tmp_path / lease.FILE).read_text())["beats"] > taken)


def test_a_lease_that_cannot_be_read_for_a_while_is_no_takeover(tmp_path: Path) -> None:
    """The process would end at once if it were."""
    with Lease(tmp_path, "a", beat=0.02):
        path = tmp_path / lease.FILE
        held = path.read_text()
        for text in ("{", None, held):
            path.unlink() if text is None else path.write_text(text)
            time.sleep(0.1)
        wait_for(lambda: json.loads(path.read_text())["beats"] > json.loads(held)["beats"])


def test_a_wait_can_be_ended(tmp_path: Path) -> None:
    record = {"owner": "job 7_1", "host": "far", "machine": "elsewhere", "token": "t", "beats": 3}
    (tmp_path / lease.FILE).write_text(json.dumps(record))

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Lease(tmp_path, "mine", stopped=stop, beat=0.05):
        raise AssertionError("it was never free")
    assert owner(tmp_path) == "job 7_1"
