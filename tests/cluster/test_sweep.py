"""A sweep as a chain of job arrays on a real SLURM: what its points share, then the points, then the ranked table (slow tier)."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from jmt_dist.cluster import status
from jmt_dist.config import PackOptions
from jmt_dist.data.pack import pack
from tests.cluster.conftest import ROOT, Workplace, starts
from tests.cluster.test_local import wait_for
from tests.data.tree import write_unit
from tests.launch.test_programs import SWEEP, start, write_sweep

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
SITE = (
    "name: mini\nexecutor: slurm\npartition: mini\ndevice: cpu\nparallel: 2\nmemory_gb: 3\ntime: '00:20:00'\nsignal_seconds: 60\ntries: 2\n"
)
WORDS = ["visual.size=16", "features.offsets=[1]", "fusion.baselines=[]", "fusion.seeds=[0]", "evaluate.bootstrap=20"]
WORDS += [f"{stage}.{word}" for stage in ("visual", "audio") for word in ("batch=4", "max_epochs=1", "max_steps=2")]
WORDS += ["fusion.model=concat", "fusion.offsets_per_epoch=1", "fusion.validation_offsets=[1]", "evaluate.offsets=[1]"]
FOLDS = ("official", "fold-1")


def sacct(out: Path) -> dict[str, list[dict[str, str]]]:
    """Accounting's rows of the jobs that were submitted from a sweep's folder, by job name."""
    fields = ["JobID", "JobName", "State", "Start", "End"]
    words = ["sacct", "-n", "-X", "-P", "--starttime=now-1hours", f"--format={','.join(fields)}"]
    found: dict[str, list[dict[str, str]]] = {}
    for line in subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines():
        row = dict(zip(fields, line.split("|"), strict=True))
        if row["JobName"].startswith(f"jmt-{out.name}-"):
            found.setdefault(row["JobName"].removeprefix(f"jmt-{out.name}-"), []).append(row)
    return found


def settled(out: Path) -> dict[str, list[dict[str, str]]]:
    """The same once accounting, which is behind, has heard of every end."""
    deadline = time.monotonic() + 60
    while any(row["End"] == "Unknown" for rows in sacct(out).values() for row in rows):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return sacct(out)


def test_shared_stages_then_points_then_the_ranked_table(cluster: Path, tmp_path: Path) -> None:
    for k in range(7):
        write_unit(tmp_path / "tree", f"u{k}", 70, k, "Train_Set" if k < 5 else "Validation_Set")
    pack(PackOptions(source=str(tmp_path / "tree"), out=str(tmp_path / "shards"), workers=1), say=lambda line: None)
    (tmp_path / "site.yaml").write_text(SITE)
    grid = "grid: {fusion.optimizer.lr: [1e-3, 1e-4], fusion.batch: [4]}\n"
    (tmp_path / "grid.yaml").write_text(f"recipe: {ROOT}/launch/recipes/demo.yaml\n{grid}")
    out = tmp_path / "micro-grid"
    words = [f"sweep={tmp_path}/grid.yaml", f"site={tmp_path}/site.yaml", f"out={out}", f"folds=[{','.join(FOLDS)}]"]
    command = [sys.executable, "launch/submit_sweep.py", *words, *WORDS, "visual.batch=2", f"data.shards={tmp_path}/shards"]
    answer = subprocess.run(command, cwd=ROOT, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    backbones, features, points = re.findall(r"submitted array (\d+)", answer.stdout)
    compare = json.loads((out / "sweep.json").read_text())["compare"]
    queue = subprocess.run(["squeue", "-h", "-o", "%A|%E"], capture_output=True, text=True).stdout
    waits = dict(line.split("|") for line in queue.splitlines() if "afterany" in line)
    for job, before in ((features, backbones), (points, features), (compare, points)):
        assert waits[job].startswith(f"afterany:{before}"), queue

    watch = [sys.executable, "launch/show_status.py", f"out={out}", "--watch", "--every", "1"]
    answer = subprocess.run(watch, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert answer.returncode == 0 and "10 of 10 folds are done" in answer.stdout, answer.stdout + answer.stderr
    deadline = time.monotonic() + 300
    while not (out / "report.html").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.2)

    rows = settled(out)
    sizes = {name: Counter(row["State"] for row in found) for name, found in rows.items()}
    assert sizes == {
        "backbones": {"COMPLETED": 4},
        "features": {"COMPLETED": 2},
        "variants": {"COMPLETED": 4},
        "variants-compare": {"COMPLETED": 1},
    }
    order = [rows[name] for name in ("backbones", "features", "variants", "variants-compare")]
    for first, then in itertools.pairwise(order):
        assert max(row["End"] for row in first) <= min(row["Start"] for row in then)

    runs = json.loads((out / "sweep.json").read_text())
    kinds = [name.partition("-")[0] for name in runs["runs"] if name.startswith("shared/")]
    assert sorted(kinds) == ["shared/audio", "shared/features", "shared/visual"] and len(runs["variants"]) == 2
    for fold in FOLDS:
        for stage in ("visual", "audio", "features"):  # trained in one place, and the same files everywhere
            found = list(out.glob(f"**/{fold}/{stage}/done.json"))
            assert len(found) >= 3 and len({path.stat().st_ino for path in found}) == 1
        for name in runs["runs"]:
            assert [entry["outcome"] for entry in json.loads((out / name / fold / "attempts.json").read_text())["attempts"]] == ["done"]
    with (out / "comparison.csv").open() as file:
        table = [(row["run"], row["fold"], row["average"]) for row in csv.DictReader(file) if row["average"] != "nan"]
    scores = {
        (name, fold): json.loads((out / name / fold / "metrics.json").read_text())["average"] for name in runs["variants"] for fold in FOLDS
    }
    best = sorted(runs["variants"], key=lambda name: -scores[name, "official"])
    assert table == [(f"demo-{name}", fold, f"{scores[name, fold]:.6f}") for name in best for fold in FOLDS]
    assert f"| 1 | demo-{best[0]} |" in (out / "comparison.md").read_text()


def test_a_shared_stage_that_fails_or_is_cancelled_lets_nobody_wait_for_ever(workplace: Workplace, cluster: Path) -> None:
    """fold-1's audio stage fails, fold-2's are cancelled by hand: those that need them end at once and say why, official is done."""
    sweep = write_sweep(workplace, "  plain: []\n  wide: [fusion.batch=4]\n")
    out = workplace.out()
    words = [f"sweep={sweep}", f"site={workplace.site}", f"out={out}", "folds=[official,fold-1,fold-2]", "wait=true"]
    words += [
        "site.executor=slurm",
        "site.partition=mini",
        "site.signal_seconds=60",
        "site.time=00:10:00",
        "site.parallel=6",
        "site.tries=2",
    ]
    toy = {"official": {"stages": True}, "fold_1": {"stages": True, "fail_stage": "audio"}, "fold_2": {"stages": True, "steps": 3000}}
    process = start(workplace, "submit_sweep", SWEEP, *words, **toy)
    endless = [run for kind in ("visual", "audio") for run in wait_glob(out, f"shared/{kind}-*")]
    wait_for(lambda: all(any(note["fold"] == "fold-2" and "from" in note for note in starts(run)) for run in endless))
    for run in endless:
        jobs = json.loads((run / "jobs.json").read_text())["jobs"]
        subprocess.run(["scancel", next(job["job"] for job in jobs if job["fold"] == "fold-2")], check=True)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 3 and "of 15 folds are done" in text, text
    assert subprocess.run(["squeue", "-h", "-o", "%j %T %r"], capture_output=True, text=True).stdout.count("jmt-") <= 1  # the comparison
    reasons = {}
    for name in ("plain", "wide"):
        for fold, state in (("official", "done"), ("fold-1", "failed"), ("fold-2", "failed")):
            found = status.read_status(out / name, fold)
            assert found["state"] == state, (name, found, text)
            reasons[fold] = found["reason"]
            assert len(json.loads((out / name / fold / "attempts.json").read_text())["attempts"]) == 1  # it would come again
    for fold in ("fold-1", "fold-2"):
        assert "features-" in reasons[fold] and "which this job shares with others, is not done" in reasons[fold]
    assert "toy failure in audio" in reasons["fold-1"] and "asked to end (SIGTERM)" in reasons["fold-2"]
    wait_for(lambda: (out / "comparison.csv").is_file())


def wait_glob(folder: Path, pattern: str) -> list[Path]:
    wait_for(lambda: any((path / "jobs.json").is_file() for path in folder.glob(pattern)))
    return list(folder.glob(pattern))
