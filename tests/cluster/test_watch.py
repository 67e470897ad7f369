"""Looking at jobs for hours: a controller that is away for a while does not end it, one that stays away does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from jmt_dist.cluster import attempts, crash, status, watch
from jmt_dist.errors import UserError
from tests.cluster.conftest import ROOT


def row(state: str) -> status.Row:
    return status.Row("official", state, "", "", "", "", "1", "7_0", "n1", "", "", "")


def test_a_controller_that_is_away_for_a_while_is_asked_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[str] = ["running", "", "", "done"]

    def rows(out: Path) -> list[status.Row]:
        answer = answers.pop(0)
        if not answer:
            raise UserError("squeue failed: Unable to contact slurm controller")
        return [row(answer)]

    monkeypatch.setattr(watch, "rows", rows)
    assert watch.watch(Path("run"), lines=0, every=0.01) == 0
    text = capsys.readouterr().out
    assert text.count("Unable to contact slurm controller; asking again") == 2 and "1 of 1 folds are done" in text
    answers[:] = ["running", "", "done"]
    monkeypatch.setattr(watch, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(UserError, match="Unable to contact"):
        watch.watch(Path("run"), lines=0, every=0.01)


def test_a_crash_that_cannot_be_queued_again_is_a_failure_with_both_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    out = tmp_path / "run"
    attempts.open_attempt(out, "official", attempts.Start("now", "7_0"))
    status.write_json(tmp_path / "tasks.json", {"submission": "now", "tries": 3, "tasks": [[str(out), "official"]]})
    assert crash.main([str(tmp_path / "tasks.json"), "137"]) == 1
    found = status.read_status(out, "official")
    expected = "crashed: the ranks were killed by signal 9; could not be queued again: squeue failed: Unable to contact slurm controller"
    assert (found["state"], found["reason"]) == ("failed", expected)


def test_a_rank_that_misses_another_one_does_not_hide_why_that_one_is_gone(tmp_path: Path) -> None:
    lost = RuntimeError("[pair.cc:545] Read error [127.0.0.1]:15070: Connection reset by peer. Check the remote worker.")
    killed = "the ranks were killed by signal 9"
    start = attempts.Start("now", "7_0")
    attempts.open_attempt(tmp_path, "official", start)
    attempts.report_error(tmp_path, "official", 0, lost)
    assert attempts.settle(tmp_path, "official", start, 2, killed).reason.startswith(f"crashed: {killed}; rank 0: RuntimeError: [pair")
    start = attempts.Start("now", "7_0", 1)
    attempts.open_attempt(tmp_path, "official", start)
    attempts.report_error(tmp_path, "official", 0, lost)
    attempts.report_error(tmp_path, "official", 1, UserError("no weights"))  # it had looked for damaged shards first
    verdict = attempts.settle(tmp_path, "official", start, 9, "the ranks exited with 1 and left no reason")
    assert (verdict.next, verdict.reason) == ("failed", "crashed: rank 1: no weights")


def test_slow_tests_that_cannot_run_here_are_left_out_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    command = ["/bin/bash", "tests/install_packages"]
    answer = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True)  # no root, and nothing there
    assert answer.returncode == 0 and " and not browser and not slurm" in answer.stdout
    assert answer.stderr.startswith("left out here: browser slurm") and answer.stderr.count("\n") == 1 and "mariadb-server" in answer.stderr
