"""What a cluster does to jobs, all in one array: a requeue, a node that fails while its job lives on, a killed rank (slow tier)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jmt_dist.recipe import load_recipe
from jmt_dist.report.tables import table1_csv
from jmt_dist.track.compare import read_run
from tests.cluster import micro
from tests.cluster.conftest import CLUSTER, ROOT, attempts_of
from tests.cluster.test_local import wait_for
from tests.ranks import run_ranks

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
SITE = (
    "partition: mini\nexecutor: slurm\ndevice: cpu\nparallel: 2\nmemory_gb: 5\ntime: '00:20:00'\nsignal_seconds: 60\ntries: 4\nname: mini\n"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and features of the six folds in `template`."""
    folder = tmp_path_factory.mktemp("micro")
    words = [*micro.WORDS, f"data.shards={micro.write_shards(folder)}"]
    micro.write_features(folder / "template", load_recipe(None, words))
    (folder / "site.yaml").write_text(SITE)
    (folder / "recipe.yaml").write_text("name: micro\n")
    return folder


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    """A run folder of six folds that were left alone."""
    shutil.copytree(place / "template", place / "undisturbed")
    run_ranks(2, micro.undisturbed, [*micro.WORDS, f"data.shards={place / 'shards'}"], place / "undisturbed")
    return place / "undisturbed"


def status(out: Path, fold: str) -> dict[str, Any]:
    try:
        return json.loads((out / fold / "status.json").read_text())
    except FileNotFoundError:
        return {}


def in_training(out: Path, without: set[str], on: str = "") -> str:
    """A fold that has made some steps and is not in its last ones; empty where there is none now."""
    for fold in micro.FOLDS:
        found = status(out, fold)
        step = found.get("step") or 0
        running = found.get("state") == "running" and str(found.get("stage", "")).startswith("fusion")
        if running and 5 <= step <= 0.7 * found["steps"] and fold not in without and found.get("node", "").startswith(on):
            return fold
    return ""


def wait_value(function: Callable[[], str], seconds: float = 300) -> str:
    deadline = time.monotonic() + seconds
    while not (value := function()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return value


def job_of(out: Path, fold: str) -> str:
    return next(job["job"] for job in json.loads((out / "jobs.json").read_text())["jobs"] if job["fold"] == fold)


def fail_node(name: str) -> None:
    """SIGKILL to a node's slurmd; its job lives on, out of the controller's sight, which takes the node for dead."""
    home = Path(CLUSTER["SLURM_MINICLUSTER_DIR"])
    os.kill(int((home / "pid" / f"slurmd-{name}").read_text()), signal.SIGKILL)
    subprocess.run(["scontrol", "update", f"nodename={name}", "state=down", "reason=test"], check=True)


def bring_back(name: str) -> None:
    home = Path(CLUSTER["SLURM_MINICLUSTER_DIR"])
    with (home / "log" / f"slurmd-{name}.log").open("ab") as log:
        process = subprocess.Popen(["slurmd", "-D", "-N", name], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    (home / "pid" / f"slurmd-{name}").write_text(f"{process.pid}\n")


def test_six_folds_disturbed_end_as_six_undisturbed_ones(place: Path, undisturbed: Path, cluster: Path) -> None:
    out = place / "runs" / "disturbed"
    shutil.copytree(place / "template", out)
    words = [
        f"recipe={place / 'recipe.yaml'}",
        f"site={place / 'site.yaml'}",
        f"out={out}",
        *micro.WORDS,
        f"data.shards={place / 'shards'}",
    ]
    answer = subprocess.run([sys.executable, "launch/submit_folds.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr

    requeued = wait_value(lambda: in_training(out, set(), "n1"))
    subprocess.run(["scontrol", "requeue", job_of(out, requeued)], check=True)
    orphaned = wait_value(lambda: in_training(out, {requeued}, "n2"))
    fail_node("n2")
    killed = wait_value(lambda: in_training(out, {requeued, orphaned}))
    os.kill(json.loads((out / killed / "lease.json").read_text())["pid"], signal.SIGKILL)
    bring_back("n2")
    wait_for(lambda: (out / "table1.csv").is_file(), 900)

    assert (out / "table1.csv").read_text() == table1_csv(read_run(undisturbed))
    assert "nan" not in (out / "table1.csv").read_text()
    for fold in micro.FOLDS:
        assert json.loads((out / fold / "metrics.json").read_text()) == json.loads((undisturbed / fold / "metrics.json").read_text())
    outcomes = {fold: attempts_of(out, fold) for fold in micro.FOLDS}
    print(requeued, orphaned, killed, outcomes)
    assert all(found[-1] == ("done", "") for found in outcomes.values())
    assert {fold for fold, found in outcomes.items() if len(found) > 1} == {requeued, orphaned, killed}
    assert outcomes[requeued][0] == ("stopped", "asked to end (SIGTERM)")
    assert outcomes[killed][0] == ("crashed", "the ranks were killed by signal 9")
    text = subprocess.run(["sacct", "-n", "-X", "-P", "--format=JobID,State"], capture_output=True, text=True).stdout.splitlines()
    array = job_of(out, "official").split("_")[0]
    assert [f"{array}_{n}|COMPLETED" in text for n in range(6)] == [True] * 6


def test_the_path_without_submitit_gives_the_same_result_with_two_ranks_warned_and_queued_again(place: Path, cluster: Path) -> None:
    plain, ours = place / "runs" / "plain", place / "runs" / "two-ranks"
    for out in (plain, ours):
        shutil.copytree(place / "template" / "fold-1", out / "fold-1")
    files, words = [f"{place}/recipe.yaml", f"{place}/site.yaml"], [*micro.WORDS, f"data.shards={place}/shards"]
    options = ["--partition=mini", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem=5G", "--array=1"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["sbatch", *options, f"--output={place}/plain.out", f"--chdir={ROOT}", "slurm/run_fold.sbatch", *files, str(plain), *words]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    wait_value(lambda: in_training(plain, set()))
    subprocess.run(["scancel", "--signal=USR2", f"{answer.stdout.split()[-1]}_1"], check=True)
    wait_value(lambda: "again" if len(attempts_of(plain, "fold-1")) == 2 else "")

    more = ["site.ranks_per_node=2", "folds=[fold-1]", "compare=false", "wait=true"]
    command = [sys.executable, "launch/submit_folds.py", f"recipe={files[0]}", f"site={files[1]}", f"out={ours}", *words, *more]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    wait_for(lambda: status(plain, "fold-1").get("state") in ("done", "failed"), 300)
    log = (place / "plain.out").read_text()
    assert attempts_of(plain, "fold-1") == [("stopped", "SIGUSR2"), ("done", "")], log
    assert log.count("fold fold-1 of micro, stages fusion, evaluate, 2 rank(s)") == 2 and "back into the queue" in log
    assert attempts_of(ours, "fold-1") == [("done", "")]
    assert (plain / "fold-1" / "metrics.json").read_text() == (ours / "fold-1" / "metrics.json").read_text()
