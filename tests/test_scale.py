"""The model of hours on 1 to 64 GPUs, against figures worked out by hand; and a large sweep as one sbatch call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import HERE, ROOT, Workplace
from tests.cluster.test_slurm import slurm  # noqa: F401

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_scale

SIZES = {stage: {"gradient_bytes": 120_000_000} for stage in ("visual", "audio", "fusion")}


def test_the_model_of_hours_by_hand() -> None:
    options = bench_scale.ScaleOptions(step_visual_ms=80, step_audio_ms=64, step_fusion_ms=10, samples=10_000, train_share=0.8)
    inputs, origin = bench_scale.steps_of(options)
    assert set(origin.values()) == {"given"}
    hours = bench_scale.fold_hours(options, inputs, SIZES, 1)
    # 8,000 samples: 1,000 steps of 8, 125 of 64, and 8 passes of 4,000 steps of 2; data hides behind the step, 16.6 and 132.8 / 8 cores
    # and 2,000 for validation: 250 and 31.25 forward passes of a third of a step
    assert hours["visual"] == pytest.approx(15 * (1_000 * 80 + 250 * 80 / 3) / 3.6e6)
    assert hours["audio"] == pytest.approx(15 * (125 + 31.25) * max(64, 64 * 16.6 / 8) / 3.6e6)
    assert hours["fusion"] == pytest.approx(5 * 32_000 * 10 / 3.6e6)
    assert hours["features"] == pytest.approx(10_000 * 8 * (80 / 8 + 64 / 64) / 3 / 3.6e6)
    assert hours["total"] == pytest.approx(sum(value for name, value in hours.items() if name != "total"))
    # four ranks of one node: 6/4 of 120 MB at 100 GB/s is 1.8 ms, and six hops of 15 us; half of it shows
    four = bench_scale.fold_hours(options, inputs, SIZES, 4)
    assert four["visual"] == pytest.approx(15 * (1_000 * (80 / 4 + (1.8 + 0.09) / 2) + 250 * 20 / 3) / 3.6e6)
    # over nodes: 14/8 of 120 MB at 20 GB/s is 10.5 ms, 14 hops; two subsequences divide over two ranks at most
    eight = bench_scale.fold_hours(options, inputs, SIZES, 8)
    assert eight["visual"] == pytest.approx(15 * (1_000 * (80 / 8 + (10.5 + 0.21) / 2) + 250 * 10 / 3) / 3.6e6)
    assert eight["fusion"] == pytest.approx(5 * 32_000 * (10 + (1.2 + 0.03) / 2) / 3.6e6)
    row = bench_scale.model(options, inputs, SIZES, 8)
    assert row["fold_efficiency"] == pytest.approx(hours["total"] / (8 * eight["total"]))
    ways = {n: -(-6 // n) * bench_scale.fold_hours(options, inputs, SIZES, 8 // n)["total"] for n in range(1, 7)}
    assert row["six_hours"] == min(ways.values()) and row["six_efficiency"] == pytest.approx(6 * hours["total"] / (8 * min(ways.values())))


def test_a_sweep_is_one_sbatch_call_however_many_tasks(workplace: Workplace, slurm: Path) -> None:  # noqa: F811
    sweep, out = workplace.folder / "many.yaml", workplace.out()
    sweep.write_text(f"recipe: {workplace.recipe.name}\nsamples: 10\nrandom: {{seed: {{low: 0, high: 1000000}}}}\n")
    words = [
        f"sweep={sweep}",
        f"site={workplace.site}",
        f"out={out}",
        "site.executor=slurm",
        "stages=[fusion,evaluate]",
        "compare=false",
        "folds=[fold-1,fold-2]",
    ]
    environment = {**workplace.environment(), "FAKE_SLURM_HOLD": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    command = [sys.executable, "launch/submit_sweep.py", *words]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    scripts = list(slurm.glob("*.script"))
    assert len(scripts) == 1 and "#SBATCH --array=0-19%2" in scripts[0].read_text()
    tasks = json.loads(next((out / "jobs").glob("*/variants/tasks.json")).read_text())["tasks"]
    assert len({(run, fold) for run, fold in tasks}) == 10 * 2


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("scale"))
