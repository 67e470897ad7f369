"""The local scheduler with real processes: limit, resume, crashes, time limit, signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, Workplace, alive, attempts_of, starts

FOLDS = ["official", "fold-1", "fold-2", "fold-3", "fold-4", "fold-5"]


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def most_at_once(out: Path) -> int:
    notes = starts(out)
    events = sorted([(note["time"], 1) for note in notes if "from" in note] + [(note["end"], -1) for note in notes if "end" in note])
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def test_all_folds_run_at_most_two_at_a_time_and_a_second_run_starts_nothing(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_TRACKING", "1")
    out = workplace.out()
    code, text = workplace.submit(out, star={"steps": 5, "seconds": 0.4})
    assert code == 0, text
    assert most_at_once(out) == 2
    assert sorted(note["fold"] for note in starts(out) if "end" in note) == sorted(FOLDS)
    assert (out / "table1.csv").read_text().split() == ["fold", *sorted(FOLDS)]
    assert text.splitlines()[-1] == str(out)
    first = starts(out)[0]
    assert (first["OMP_NUM_THREADS"], first["MASTER_ADDR"], first["CUDA_VISIBLE_DEVICES"]) == ("1", "127.0.0.1", "")
    assert out.stat().st_mode & 0o077 == 0
    assert json.loads((out / "parent_run.json").read_text())["uri"] == f"sqlite:///{out.parent / 'mlflow.db'}"
    assert len({json.loads((out / fold / "spool" / "run.json").read_text())["run_id"] for fold in FOLDS}) == 6

    jobs, before = (out / "jobs.json").read_text(), len(starts(out))
    began = time.monotonic()
    code, text = workplace.submit(out)
    assert code == 0 and "nothing to do" in text
    assert time.monotonic() - began < 5
    assert len(starts(out)) == before and (out / "jobs.json").read_text() == jobs

    # another recipe is other work: it runs again, with runs of its own, and the spools of before are kept
    parent = (out / "parent_run.json").read_text()
    code, text = workplace.submit(out, "seed=7", "folds=[official]")
    assert code == 0 and len([note for note in starts(out)[before:] if "from" in note]) == 1, text
    assert (out / "parent_run.json").read_text() != parent
    assert (out / "official" / "spool-1" / "run.json").is_file()


def test_a_crash_is_started_again_from_its_checkpoint_and_tries_are_bounded(workplace: Workplace) -> None:
    out = workplace.out()
    toy = {
        "official": {"raise_at": 2},
        "fold_1": {"die_at": 1},
        "fold_2": {"raise_at": 1, "user": "no weights"},
        "fold_3": {"steps": 0},
    }
    code, text = workplace.submit(out, "folds=[official,fold-1,fold-2,fold-3]", "site.tries=2", **toy)
    assert code == 3, text
    # official fails at step 2 of its first start and goes on from there
    assert attempts_of(out, "official") == [("crashed", "rank 0: RuntimeError: toy failure at start 1"), ("done", "")]
    assert [note["from"] for note in starts(out) if note["fold"] == "official" and "from" in note] == [0, 2]
    # killed with no word of its own: the exit code tells
    assert attempts_of(out, "fold-1")[0] == ("crashed", "rank 0 was killed by SIGKILL")
    # what the user must put right is not tried again
    assert attempts_of(out, "fold-2") == [("crashed", "rank 0: no weights")]
    assert "failed: fold-2: crashed: rank 0: no weights; log " in text
    assert json.loads((out / "fold-2" / "status.json").read_text())["state"] == "failed"
    log = Path(text.split("failed: fold-2: ")[1].split("log ")[1].splitlines()[0])
    assert "no weights" in log.read_text()
    assert "official" in (out / "table1.csv").read_text()


@pytest.mark.slow
def test_a_fold_that_fails_for_good_leaves_a_table_of_five_and_a_clear_sixth(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_COMPARE", "jmt_dist.cluster.compare:compare")
    out = workplace.out()
    code, text = workplace.submit(out, "site.tries=2", star={"steps": 1}, fold_2={"steps": 2, "raise_at": 1, "forget": True})
    assert code == 3, text
    rows = [line.split(",") for line in (out / "table1.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == FOLDS
    assert [row[1:] for row in rows if row[0] != "fold-2"] == [["0.500000", "0.600000", "0.550000"]] * 5 and rows[2][1:] == ["nan"] * 3
    reason = "failed in visual (crashed: rank 0: RuntimeError: toy failure at start 2 (start 2 of 2))"
    assert f"missing: fold-2: {reason}" in text and reason in (out / "table1.md").read_text()
    assert attempts_of(out, "fold-2") == [("crashed", f"rank 0: RuntimeError: toy failure at start {n}") for n in (1, 2)]
    show = subprocess.run([sys.executable, "launch/show_status.py", f"out={out}", "lines=3"], cwd=ROOT, capture_output=True, text=True)
    assert show.returncode == 1 and "fold-2: the last lines of " in show.stdout
    assert show.stdout.splitlines()[-2].strip() == "RuntimeError: toy failure at start 2"
    watch = [sys.executable, "launch/show_status.py", f"out={out}", "--watch", "--every", "0.1"]
    answer = subprocess.run(watch, cwd=ROOT, capture_output=True, text=True)  # nothing is left to wait for
    assert answer.returncode == 3 and "5 of 6 folds are done" in answer.stdout
    again = [sys.executable, "-c", "import tests.cluster.resume_toy", str(out)]
    answer = subprocess.run(again, cwd=ROOT, env=workplace.environment(star={"steps": 2}), capture_output=True, text=True)
    assert answer.returncode == 0 and "already done: official, fold-1, fold-3, fold-4, fold-5" in answer.stdout, (
        answer.stdout + answer.stderr
    )
    assert "nan" not in (out / "table1.csv").read_text()


def test_all_failed_gives_exit_code_1_and_no_table(workplace: Workplace) -> None:
    out = workplace.out()
    code, text = workplace.submit(out, "folds=[official,fold-1]", "site.tries=2", star={"raise_at": 1, "steps": 2, "user": "broken"})
    assert code == 1, text
    assert text.count("failed: ") == 2
    assert not (out / "table1.csv").exists()


def test_a_dead_rank_takes_its_siblings_along(workplace: Workplace) -> None:
    out = workplace.out()
    toy = {"steps": 1, "seconds": 0.2, "die_at": 1, "die_rank": 1}
    began = time.monotonic()
    sleepy = {"official": toy | {"steps": 400}}
    code, text = workplace.submit(out, "folds=[official]", "site.ranks_per_node=2", "site.tries=1", **sleepy)
    assert code == 1, text
    assert attempts_of(out, "official") == [("crashed", "rank 1 was killed by SIGKILL")]
    assert 5 <= time.monotonic() - began < 60  # five seconds of grace; alone, rank 0 would need 80
    assert not [note["pid"] for note in starts(out) if alive(note["pid"])]


def test_the_time_limit_stops_a_fold_which_goes_on_in_its_next_start(workplace: Workplace) -> None:
    out = workplace.out()
    words = ["folds=[official]", "site.time=00:00:08", "site.signal_seconds=4", "site.tries=9"]
    code, text = workplace.submit(out, *words, official={"steps": 120, "seconds": 0.05})
    assert code == 0, text
    outcomes = attempts_of(out, "official")
    assert outcomes[-1] == ("done", "") and outcomes[0] == ("stopped", "time limit or preemption (SIGUSR2)")
    begins = [note["from"] for note in starts(out) if "from" in note]
    assert begins[0] == 0 and begins == sorted(begins) and begins[1] > 0


def test_a_job_deaf_to_the_warning_is_ended_at_the_limit(workplace: Workplace) -> None:
    out = workplace.out()
    words = ["folds=[official]", "site.time=00:00:03", "site.signal_seconds=1", "site.tries=1"]
    code, text = workplace.submit(out, *words, official={"steps": 3000, "seconds": 0.05, "deaf": True})
    assert code == 1, text
    assert attempts_of(out, "official") == [("timeout", "time limit site.time=00:00:03 reached")]
    assert not [note["pid"] for note in starts(out) if alive(note["pid"])]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_every_job_after_it_has_saved(workplace: Workplace, number: signal.Signals) -> None:
    out = workplace.out()
    process = workplace.start(out, "folds=[official,fold-1,fold-2]", star={"steps": 1000, "seconds": 0.02})
    wait_for(lambda: len(starts(out)) == 2)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "the same command goes on" in text
    assert not [note["pid"] for note in starts(out) if alive(note["pid"])]
    for fold in ("official", "fold-1"):
        assert attempts_of(out, fold) == [("stopped", "asked to end (SIGTERM)")]
        assert json.loads((out / fold / "status.json").read_text())["state"] == "stopped"
    assert not (out / "fold-2" / "attempts.json").exists()
    if number == signal.SIGTERM:
        saved = int((out / "official" / "state-0").read_text())
        code, text = workplace.submit(out, "folds=[official]", star={"steps": saved + 2, "seconds": 0.02})
        assert code == 0, text
        assert starts(out)[-2]["from"] == saved


def test_under_nohup_a_closed_terminal_stops_nothing(workplace: Workplace) -> None:
    out = workplace.out()
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a new program inherits what is ignored
    process = workplace.start(out, "folds=[official]", star={"steps": 10, "seconds": 0.05})
    signal.signal(signal.SIGHUP, kept)
    wait_for(lambda: len(starts(out)) == 1)
    process.send_signal(signal.SIGHUP)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert attempts_of(out, "official") == [("done", "")]


def test_jobs_end_with_a_killed_scheduler(workplace: Workplace) -> None:
    out = workplace.out()
    process = workplace.start(out, "folds=[official]", star={"steps": 3000, "seconds": 0.02})
    wait_for(lambda: len(starts(out)) == 1)
    process.kill()
    process.communicate()
    wait_for(lambda: not alive(starts(out)[0]["pid"]), 30)
    assert attempts_of(out, "official") == [("stopped", "asked to end (SIGTERM)")]


def test_two_submissions_do_not_share_a_run_folder(workplace: Workplace) -> None:
    out = workplace.out()
    process = workplace.start(out, "folds=[official]", star={"steps": 3000, "seconds": 0.02})
    wait_for(lambda: len(starts(out)) == 1)
    code, text = workplace.submit(out, "folds=[official]")
    assert code == 1 and f"process {process.pid} is at work in {out}" in text
    process.terminate()
    process.communicate(timeout=60)


def test_a_job_runs_the_code_of_its_submission(workplace: Workplace) -> None:
    out = workplace.out()
    toy = {"official": {"steps": 30, "seconds": 0.05, "raise_at": 20}}
    process = workplace.start(out, "folds=[official]", "site.tries=2", **toy)
    wait_for(lambda: len(starts(out)) == 1)
    process.communicate(timeout=60)
    codes = {note["code"] for note in starts(out) if "code" in note}
    snapshot = json.loads((out / "snapshot.json").read_text())
    assert codes == {f"{snapshot['path']}/jmt_dist/__init__.py"} and snapshot["path"].startswith(str(out))
    assert process.returncode == 0


def test_shell_lines_of_the_site_come_before_the_job(workplace: Workplace) -> None:
    out = workplace.out()
    line = "site.environment=['export TOY_EXTRA=\"from the site\"', 'export PYTHONPATH=/nowhere']"
    code, text = workplace.submit(out, "folds=[official]", line)
    assert code == 0, text
    assert starts(out)[0]["extra"] == "from the site"
    broken = workplace.out()
    code, text = workplace.submit(broken, "folds=[official]", "site.environment=['exit 7']", "site.tries=2")
    assert code == 1 and "its controller ended with 7" in text


def test_ranks_meet_over_gloo_from_the_environment_alone(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_FUNCTION", "toyjob:gloo")
    out = workplace.out()
    words = ["folds=[official]", "site.ranks_per_node=2", "site.cpus_per_rank=1"]
    code, text = workplace.submit(out, *words)
    assert code == 0, text + "".join(path.read_text() for path in (out / "jobs").rglob("*_log.out"))
    assert {(out / f"sum-{rank}").read_text() for rank in range(2)} == {"3 1"}


def test_an_id_in_use_by_another_process_is_left_alone(workplace: Workplace) -> None:
    from jmt_dist.cluster import control

    created = float(Path(f"/proc/{os.getpid()}/stat").read_text().rsplit(")", 1)[1].split()[19])
    assert not control.is_running({"pid": os.getpid(), "created": created})  # clock ticks are not seconds since 1970
    assert control.members({"pid": os.getsid(0), "created": time.time() + 1000}) == []
