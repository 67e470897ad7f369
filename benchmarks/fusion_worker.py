"""A training of the fusion stage in a process of its own, for rehearse_fusion.py: its last line is what it measured, as JSON.

fusion_worker.py FOLDER BATCH LIMIT_MINUTES THREADS PRECISION
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch

from jmt_dist.config import Recipe, Site
from jmt_dist.data.features import read_features
from jmt_dist.recipe import load_recipe
from jmt_dist.track import names
from jmt_dist.train import ranks
from jmt_dist.train.fuse import fusion_stage
from jmt_dist.train.plan import FoldPlan
from jmt_dist.train.stage import Surroundings, Trainer

RECIPE = Path(__file__).resolve().parent.parent / "launch" / "recipes" / "paper.yaml"
TRIAL = 40  # steps from which it is reckoned how many fit into the time
WARM_UP = 10


def own_mb() -> float:
    """Memory of this process that is no mapped file, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1000


class Watch:
    """Hears of every step, and notes time and memory."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []  # wall and processor time after each step
        self.memory: list[tuple[int, int]] = []
        self.waits: list[float] = []

    def status(self, **values: Any) -> None:
        """Called after each step, and after a validation."""
        if values["step"] == len(self.times) + 1:
            self.times.append((time.perf_counter(), time.process_time()))
            if len(self.times) % max(10, values["steps"] // 10) == 0:
                self.memory.append((values["step"], round(own_mb())))

    def log(self, values: dict[str, float], step: int) -> None:
        """Called every ten steps."""
        self.waits += [value for name, value in values.items() if name.endswith(names.WAIT)]


def train(folder: Path, recipe: Recipe, name: str) -> tuple[Watch, dict[str, Any], float]:
    """Train as the fold would; returns what was heard, the result, and when it ended."""
    watch = Watch()
    device = torch.device("cpu")
    around = Surroundings(recipe.engine, device, watch.log, watch.status)
    none = cast(Any, None)  # the fusion asks for the key of the features, not for what is in them
    plan = FoldPlan(recipe, Site(), "official", folder / name, device, none, {}, around, {"features": "planted"})
    sets = (read_features(folder / "features", part) for part in ("train", "validation"))
    result = Trainer(fusion_stage(plan, recipe.fusion.model, 0, *sets), around).run()
    return watch, result, time.perf_counter()


def main(folder: Path, batch: int, minutes: float, threads: int, precision: str) -> None:
    """A short training to learn the pace, then one that fills the time, an epoch at most."""
    torch.set_num_threads(threads)
    ranks.start(torch.device("cpu"))
    words = [f"fusion.batch={batch}", f"engine.precision={precision}", "fusion.max_epochs=1", "fusion.offsets_per_epoch=8"]
    trial = [*words, f"fusion.max_steps={TRIAL}", "fusion.validation_offsets=[0]"]
    watch, _, _ = train(folder, load_recipe(RECIPE, trial), f"trial-{batch}")
    pace = (watch.times[-1][0] - watch.times[WARM_UP][0]) / (TRIAL - 1 - WARM_UP)
    steps = max(2 * TRIAL, int(60 * minutes / pace))
    watch, result, end = train(folder, load_recipe(RECIPE, [*words, f"fusion.max_steps={steps}"]), f"batch-{batch}")
    (begin, cpu_begin), (last, cpu_last) = watch.times[WARM_UP], watch.times[-1]
    found = {
        "steps": len(watch.times) - 1 - WARM_UP,
        "warm_up_steps": 1 + WARM_UP,
        "seconds": last - begin,
        "cpu_seconds": cpu_last - cpu_begin,
        "validation_seconds": round(end - last, 1),
        "score": round(result["score"], 4),
        "data_wait": round(sum(watch.waits) / len(watch.waits), 4),
        "own_mb": watch.memory,
    }
    print(json.dumps(found), flush=True)
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
