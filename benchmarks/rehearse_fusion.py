"""The fusion stage at the real dataset's size: 28,000 training samples of 8 offsets, random features with a planted signal, two cores.

    python benchmarks/rehearse_fusion.py --json benchmarks/results
    python benchmarks/rehearse_fusion.py samples=560 validation=120        a short trial

The stage is the program's own (`jmt_dist.train.fuse`), from feature shards on disk to weights, checkpoints and validation included,
under paper.yaml; each batch size runs in a process of its own. Where an epoch takes longer than `limit_minutes`, a share of it is
measured and the rest is taken to go on at the same pace: `share_of_epoch` says so. What is written is removed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from common import REPOSITORY, Memory, Result, median, run, use_cores
from pydantic import Field
from rehearse_full_scale import disk_of, removed

from jmt_dist.config import Options, Positive
from jmt_dist.errors import UserError

OFFSETS = 8
BYTES = 133_120  # of a sample, on disk
RECIPE = REPOSITORY / "launch" / "recipes" / "paper.yaml"


class FusionRehearsal(Options):
    """What is rehearsed."""

    samples: Positive = Field(28_000, description="training samples; the real training set has about as many")
    validation: Positive = Field(6_000, description="validation samples; the official one has about as many")
    batches: list[Positive] = Field([64, 2], description="batch sizes; the paper's is 2")
    limit_minutes: Annotated[float, Field(gt=0)] = Field(12.0, description="training time per batch size, at most; 0.1 of it is warm-up")
    threads: Positive = Field(2, description="torch's threads, and cores")
    precision: str = Field("autocast", description="engine.precision; autocast is the recipe's")


def bench(options: FusionRehearsal, out: Path) -> Result:
    """Write the features, train on them with each batch size, give the disk back."""
    use_cores(options.threads)
    folder = out / "fusion-scale"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    need = (options.samples + options.validation) * BYTES + 2e9
    if shutil.disk_usage(out).free < need:
        raise UserError(f"{need / 1e9:.1f} GB are needed in {out}", "Free some space, or give --out on another disk.")
    folder.mkdir()
    with removed(folder):
        start = time.perf_counter()
        command = "from fusion_data import write_all; from pathlib import Path; import sys; "
        command += "write_all(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
        words = [str(folder / "features"), str(options.samples), str(options.validation)]
        subprocess.run([sys.executable, "-c", command, *words], check=True, env=_environment(options))
        written = time.perf_counter() - start
        size = disk_of(folder / "features")
        found = {str(batch): _train(folder, batch, options) for batch in options.batches}
    values = {
        "samples": options.samples,
        "offsets": OFFSETS,
        "subsequences_per_epoch": options.samples * OFFSETS,
        "bytes_on_disk": size,
        "seconds_writing": round(written, 1),
        "batches": found,
        "minutes_per_epoch": {batch: one["minutes_per_epoch"] for batch, one in found.items()},
        "target": "batch 64 under 10 minutes",
    }
    return Result(values, _table(found))


def _environment(options: FusionRehearsal) -> dict[str, str]:
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "benchmarks")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(options.threads)}


def _train(folder: Path, batch: int, options: FusionRehearsal) -> dict[str, Any]:
    """Train with one batch size in a process of its own, and watch its memory."""
    words = [str(folder), str(batch), str(options.limit_minutes), str(options.threads), options.precision]
    load = os.getloadavg()[0]
    with subprocess.Popen(
        [sys.executable, str(REPOSITORY / "benchmarks" / "fusion_worker.py"), *words],
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(options),
    ) as process:
        assert process.stdout is not None
        try:
            with Memory(process.pid, interval=0.2) as memory:
                lines = []
                for line in process.stdout:
                    print(line, end="", flush=True)
                    lines.append(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise UserError(f"the training at batch {batch} ended with exit code {process.returncode}", "What it printed above says why.")
    found: dict[str, Any] = json.loads(lines[-1])
    steps = options.samples * OFFSETS // batch if options.samples % batch == 0 else -(-options.samples // batch) * OFFSETS
    pace = found["seconds"] / found["steps"]
    return {
        "steps_per_epoch": steps,
        "steps_measured": found["steps"],
        "share_of_epoch": round(min(1.0, (found["steps"] + found["warm_up_steps"]) / steps), 4),
        "ms_per_step": median([1000 * pace]),
        "cpu_ms_per_step": median([1000 * found["cpu_seconds"] / found["steps"]]),
        "minutes_per_epoch": median([pace * steps / 60]),
        "cpu_minutes_per_epoch": median([found["cpu_seconds"] / found["steps"] * steps / 60]),
        "seconds_validation": found["validation_seconds"],
        "validation_ccc": found["score"],
        "data_wait": found["data_wait"],
        "peak_mb": round(memory.own),
        "peak_mb_with_mapped_files": round(memory.resident),
        "own_mb_over_time": found["own_mb"],
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
    }


def _table(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    head = ["batch", "minutes per epoch", "processor minutes", "ms per step", "share measured", "waiting for data", "peak MB"]
    keys = ("minutes_per_epoch", "cpu_minutes_per_epoch", "ms_per_step", "share_of_epoch", "data_wait", "peak_mb")
    return [head, *([batch, *(f"{one[key]:g}" for key in keys)] for batch, one in found.items())]


if __name__ == "__main__":
    run(bench, __doc__ or "", FusionRehearsal, "fusion-scale")
