"""Packing killed at random instants, again and again, ends in the same bytes as packing left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jmt_dist.data.shards import open_shards

from .packing import contents

ROOT = Path(__file__).parents[2]


@pytest.mark.kill
def test_sigkill_at_random_instants(packed: Path, tree: Path, tmp_path: Path) -> None:
    out, rng, killed = tmp_path / "s", random.Random(0), 0
    words = [f"source={tree}", f"out={out}", "samples_per_shard=8", "workers=2"]
    command = [sys.executable, str(ROOT / "shards" / "pack_shards.py"), *words]
    start = time.monotonic()
    assert subprocess.run([*command, "dry=true"], capture_output=True, timeout=120).returncode == 0
    usual = 2 * (time.monotonic() - start) + 1  # seconds a whole run takes, about
    for _ in range(12):
        anew, start = not out.exists(), time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            _, error = process.communicate(timeout=rng.uniform(0.3, 1) * usual)
            usual = time.monotonic() - start if anew else usual  # less than was thought, where the machine was busy before
        except subprocess.TimeoutExpired:
            # the workers with it, as a cgroup limit does; never through the `kill` program, some of which take -PGID for "all"
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
            _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), error
        if (out / "manifest.json").exists():
            open_shards(out)  # a manifest that is there is whole
            if process.returncode == 0:
                shutil.rmtree(out)  # finished before it was killed: begin anew
    assert killed >= 3
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    assert contents(out) == contents(packed)
