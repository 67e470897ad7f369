"""The submission path on a real SLURM: array, SLURM's own warning, requeue, dead ranks, cancellation (slow tier)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, Workplace, alive, attempts_of, starts
from tests.cluster.test_local import wait_for

pytestmark = pytest.mark.slurm
WORDS = ["site.executor=slurm", "site.partition=mini", "site.signal_seconds=60"]
CLUSTER = {"SLURM_MINICLUSTER_DIR": "/var/tmp/jmt-minicluster-tests", "SLURM_MINICLUSTER_PORT": "27817"}


def script(name: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "slurm" / "minicluster" / name)]
    return subprocess.run(command, env={**os.environ, **CLUSTER}, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    answer = script("up")
    assert answer.returncode == 0, answer.stderr
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(Path(CLUSTER["SLURM_MINICLUSTER_DIR"]) / "etc" / "slurm.conf")
    yield Path(answer.stdout.strip())
    os.environ.pop("SLURM_CONF")
    if before is not None:
        os.environ["SLURM_CONF"] = before
    assert script("down").returncode == 0
    assert not Path(CLUSTER["SLURM_MINICLUSTER_DIR"]).exists()
    left = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if CLUSTER["SLURM_MINICLUSTER_DIR"] in _words(path)]
    assert left == []


def _words(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def job_of(out: Path, fold: str) -> str:
    return next(job["job"] for job in json.loads((out / "jobs.json").read_text())["jobs"] if job["fold"] == fold)


def test_an_array_survives_a_signal_and_a_killed_rank_and_is_compared(workplace: Workplace, cluster: Path) -> None:
    out = workplace.out()
    words = [*WORDS, "site.time=00:10:00", "site.ranks_per_node=2", "site.cpus_per_rank=2", "folds=[official,fold-1]"]
    toy = {"official": {"steps": 40, "seconds": 0.1}, "fold_1": {"steps": 4, "die_at": 2, "die_rank": 1}}
    code, text = workplace.submit(out, *words, **toy)
    assert code == 0, text
    wait_for(lambda: len([note for note in starts(out) if note["fold"] == "official"]) == 2)
    time.sleep(0.5)
    subprocess.run(["scancel", "--signal=USR2", job_of(out, "official")], check=True)
    wait_for(lambda: (out / "table1.csv").is_file(), 120)
    assert attempts_of(out, "official") == [("stopped", "time limit or preemption (SIGUSR2)"), ("done", "")]
    # srun asks the siblings of a dead rank to end before it kills them
    assert attempts_of(out, "fold-1") == [("stopped", "asked to end (SIGTERM)"), ("done", "")]
    begins = [note for note in starts(out) if note["fold"] == "official" and "from" in note]
    assert [note["SLURM_RESTART_COUNT"] for note in begins] == [None, None, "1", "1"]
    assert {note["OMP_NUM_THREADS"] for note in begins} == {"2"} and {note["world"] for note in begins} == {2}
    assert all(note["from"] > 0 for note in begins[2:])
    assert (out / "table1.csv").read_text().split() == ["fold", "fold-1", "official"]


def test_slurm_itself_warns_before_the_time_limit(workplace: Workplace, cluster: Path) -> None:
    out = workplace.out()
    words = ["site.executor=slurm", "site.partition=mini", "site.time=00:02:00", "site.signal_seconds=110", "folds=[official]"]
    code, text = workplace.submit(out, *words, official={"steps": 600, "seconds": 0.1})
    assert code == 0, text
    wait_for(lambda: (out / "official" / "attempts.json").exists() and len(attempts_of(out, "official")) == 2, 120)
    assert attempts_of(out, "official")[0] == ("stopped", "time limit or preemption (SIGUSR2)")
    cancel = [sys.executable, "launch/cancel_jobs.py", f"out={out}"]
    assert subprocess.run(cancel, cwd=ROOT, capture_output=True).returncode == 0
    wait_for(lambda: not any(alive(note["pid"]) for note in starts(out)))


def test_a_cancelled_array_stays_cancelled(workplace: Workplace, cluster: Path) -> None:
    out = workplace.out()
    code, text = workplace.submit(out, *WORDS, "site.time=00:10:00", "site.parallel=1", "folds=[official,fold-1]", star={"steps": 3000})
    assert code == 0, text
    wait_for(lambda: starts(out))
    show = subprocess.run([sys.executable, "launch/show_status.py", f"out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert "official   running" in show.stdout and "fold-1     pending" in show.stdout, show.stdout + show.stderr
    answer = subprocess.run([sys.executable, "launch/cancel_jobs.py", f"out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert "2 job(s) ended" in answer.stdout, answer.stderr
    wait_for(lambda: not any(alive(note["pid"]) for note in starts(out)))
    time.sleep(8)  # longer than a requeued job waits
    assert len(starts(out)) == 1
    assert subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout == ""


def test_check_site_is_content_with_it(cluster: Path, tmp_path: Path) -> None:
    command = [sys.executable, "launch/check_site.py", "site=slurm/sites/minicluster.yaml", f"out={tmp_path}"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout
    assert "ok    SLURM accounting" in answer.stdout and "ok    SLURM takes the job" in answer.stdout
    answer = subprocess.run([*command, "site.partition=none"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 1 and "FAIL  SLURM takes the job" in answer.stdout


def test_the_path_without_submitit_is_a_script_that_slurm_takes(cluster: Path) -> None:
    command = ["sbatch", "--test-only", "--partition=mini", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem=1G"]
    answer = subprocess.run([*command, "slurm/run_fold.sbatch", "recipe", "site", "out"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_up_again_is_the_same_cluster(cluster: Path) -> None:
    answer = script("up")
    assert answer.returncode == 0 and "already up" in answer.stderr and answer.stdout.strip() == str(cluster)
