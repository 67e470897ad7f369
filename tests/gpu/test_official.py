"""The demo's official fold on a GPU: stopped and resumed, and its table beside the CPU's (CPU twins: tests/train)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
# the fixture and the numbers of steps of .ci/run: the same code path as the demo in a tenth of the time
FIXTURE = ["units=10", "rows=128"]
WORDS = ["visual.max_steps=12", "audio.max_steps=12", "visual.save_steps=2", "fusion.max_epochs=2", "fusion.seeds=[0]"]
TARGETS = ("valence", "arousal", "average")


def program(*words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen[str], codes: tuple[int, ...] = (0,)) -> None:
    output, _ = process.communicate()
    assert process.returncode in codes, output


def start(folder: Path, name: str, device: str, *words: str) -> subprocess.Popen[str]:
    """launch/run_fold.py on the official fold, in `folder`/`name`."""
    given = ["recipe=launch/recipes/demo.yaml", "site=slurm/sites/local.yaml", "fold=official", f"out={folder / name}"]
    given += [f"data.shards={folder / 'shards'}", f"site.device={device}", "evaluate.bootstrap=0", *WORDS, *words]
    return program("launch/run_fold.py", *given)


def fold(folder: Path, name: str, device: str, *words: str) -> dict[str, float]:
    """Its validation metrics."""
    ended(start(folder, name, device, *words))
    metrics: dict[str, float] = json.loads((folder / name / "official" / "metrics.json").read_text())
    return metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available():
        pytest.fail("torch finds no CUDA GPU here: run these tests where there is one")
    made = tmp_path_factory.mktemp("demo")
    ended(program("shards/make_fixture.py", f"out={made}/tree", *FIXTURE))
    ended(program("shards/pack_shards.py", f"source={made}/tree", f"out={made}/shards"), (0, 3))  # 3: the fixture's odd units
    return made


@pytest.mark.gpu
def test_a_table_of_the_gpu_beside_the_cpu_s(folder: Path) -> None:
    tables = {device: fold(folder, device, device) for device in ("cpu", "cuda")}
    for device, metrics in tables.items():
        print(device, *(f"{target} {metrics[target]:.3f}" for target in TARGETS))
    for target in TARGETS:  # a few steps from one start: rounding grows, but the two have learned the same
        assert tables["cuda"][target] == pytest.approx(tables["cpu"][target], abs=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("words", [[], ["engine.precision=fp16"], ["engine.compile=true"]], ids=["autocast", "fp16", "compile"])
def test_other_engines_end_too(folder: Path, words: list[str]) -> None:
    precision = ["engine.precision=autocast"] if not words or "compile" in words[0] else []
    metrics = fold(folder, "-".join(["engine", *words]).replace("=", "-"), "cuda", *precision, *words)
    assert all(-1 <= metrics[target] <= 1 for target in TARGETS)


@pytest.mark.gpu
def test_a_stopped_fold_goes_on_from_its_checkpoint(folder: Path) -> None:
    """Killed once its visual stage has saved, then taken up by the same command."""
    whole = fold(folder, "whole", "cuda", "engine.precision=fp32")
    out = folder / "resumed"
    running = start(folder, "resumed", "cuda", "engine.precision=fp32")
    checkpoints = out / "official" / "visual" / "checkpoints"
    while running.poll() is None and not list(checkpoints.glob("step-*")):
        time.sleep(0.01)
    running.kill()
    running.communicate()
    assert list(checkpoints.glob("step-*")) and not (out / "official" / "metrics.json").exists()
    resumed = fold(folder, "resumed", "cuda", "engine.precision=fp32")
    for target in TARGETS:
        assert resumed[target] == pytest.approx(whole[target], abs=0.05)
