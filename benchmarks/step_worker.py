"""Times steps of the fusion stage in a process of its own, for bench_step.py, on the code that PYTHONPATH names: an older commit's, too.

step_worker.py BATCH STEPS THREADS PRECISION        prints [wall ms, processor ms] of each step after the first ten, as JSON
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from jmt_dist.config import EngineOptions, FusionOptions, OptimizerOptions
from jmt_dist.data.features import FeatureLoader, FeatureSet
from jmt_dist.model.zoo import make_fusion
from jmt_dist.train import ranks
from jmt_dist.train.stage import Stage, Surroundings, Trainer

SAMPLES = 512
SKIPPED = 10


def features() -> FeatureSet:
    """Random features of 512 samples at 8 offsets."""
    random = np.random.default_rng(0)
    streams = [random.standard_normal((SAMPLES, 8, 8, 512), dtype=np.float32).astype("<f2") for _ in range(2)]
    labels = random.uniform(-1, 1, (SAMPLES, 64, 2)).astype("<f4")
    ident = np.stack([np.arange(SAMPLES), *[np.zeros(SAMPLES)] * 3], axis=1).astype("<i4")
    return FeatureSet(streams[0], streams[1], labels, ident, tuple(range(8)))


def main(batch: int, steps: int, threads: int, precision: str) -> None:
    """JMT as the paper has it, by SGD, from the loader to the optimiser; no checkpoint and no validation."""
    torch.set_num_threads(threads)
    ranks.start(torch.device("cpu"))
    times: list[tuple[float, float]] = []
    options = FusionOptions(batch=batch, max_steps=steps + SKIPPED, save_steps=0, max_epochs=1000, optimizer=OptimizerOptions(lr=5e-4))
    engine = EngineOptions(precision=cast(Any, precision))

    def status(**values: Any) -> None:
        times.append((time.perf_counter(), time.process_time()))

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(
            name="fusion", folder=Path(folder), key="bench", model=make_fusion(options), options=options, micro_batch=batch,
            loader=FeatureLoader(features(), batch=batch, passes=8, seed=0),
            predict=lambda net, found, draw: (net(found["audio"], found["visual"]), found["va"]),
            validation=lambda: iter(()), validate=cast(Any, None), seed=0,
        )  # fmt: skip
        trainer = Trainer(stage, Surroundings(engine, torch.device("cpu"), lambda values, step: None, status))
        trainer.engine.train()
        while len(times) < steps + SKIPPED:
            trainer._epoch()
    found = np.diff(np.array(times[SKIPPED - 1 :]), axis=0) * 1000
    print(json.dumps(found.round(3).tolist()))
    ranks.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
