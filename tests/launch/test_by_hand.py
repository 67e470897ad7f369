"""A fold in the terminal, killed once and stopped by Ctrl-C once, ends with the table of one that is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jmt_dist.config import PackOptions
from jmt_dist.data.pack import pack
from tests.data.tree import write_unit

ROOT = Path(__file__).parents[2]
WORDS = ["visual.size=16", "evaluate.bootstrap=20", "fusion.baselines=[]", "fusion.seeds=[0]", "features.offsets=[1]", "features.batch=4"]
WORDS += [
    f"{stage}.{word}" for stage in ("visual", "audio", "fusion") for word in ("batch=4", "save_steps=2", "max_epochs=9", "max_steps=8")
]
WORDS += ["fusion.offsets_per_epoch=1", "fusion.validation_offsets=[1]", "evaluate.offsets=[1]"]


def start(folder: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch" / "run_fold.py"), f"recipe={ROOT / 'launch' / 'recipes' / 'demo.yaml'}", *WORDS, *more]
    command += [f"site={ROOT / 'slurm' / 'sites' / 'local.yaml'}", "fold=official", f"out={out}", f"data.shards={folder / 'shards'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def status(out: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((out / "official" / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def reach(process: subprocess.Popen[str], out: Path, stage: str) -> None:
    """Wait until the stage has a checkpoint of its own."""
    deadline = time.monotonic() + 240
    while not list((out / "official" / stage).glob("checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


@pytest.mark.kill
def test_killed_and_interrupted_by_hand_the_same_command_ends_with_the_same_table(tmp_path: Path) -> None:
    for k in range(7):
        write_unit(tmp_path / "tree", f"u{k}", 70, k, "Train_Set" if k < 5 else "Validation_Set")
    pack(PackOptions(source=str(tmp_path / "tree"), out=str(tmp_path / "shards"), workers=1), say=lambda line: None)
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    process = start(tmp_path, parts)
    reach(process, parts, "visual")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert status(parts)["state"] == "running"  # it could not say a word
    process = start(tmp_path, parts)
    reach(process, parts, "fusion/jmt-seed0")
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C goes to the whole foreground group
    text, _ = process.communicate(timeout=240)
    if "stopped by SIGINT" in text:  # it may have been at its last step
        assert process.returncode == 1 and status(parts)["state"] == "stopped" and "goes on from there" in text
    else:
        assert process.returncode == 0
    assert "Traceback" not in text
    process = start(tmp_path, parts)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and text.splitlines()[-1] == str(parts / "official"), text
    assert "visual: already done" in text and status(parts)["state"] == "done"
    # and the stages one by one, by as many commands, lead to the same
    for stages in ("visual,audio,features", "fusion", "evaluate"):
        process = start(tmp_path, whole, f"stages=[{stages}]")
        text, _ = process.communicate(timeout=240)
        assert process.returncode == 0, text
    tables = [json.loads((out / "official" / "metrics.json").read_text()) for out in (parts, whole)]
    assert tables[0] == tables[1] and tables[0]["frames"] == 140
    outcomes = [one["outcome"] for one in json.loads((parts / "official" / "attempts.json").read_text())["attempts"]]
    assert outcomes[0] == "lost" and outcomes[-1] == "done" and len(outcomes) == 3
