"""A Chrome trace of a few steps of a stage, to see where a step's time goes (chrome://tracing, Perfetto)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from jmt_dist.train.ranks import rank

WAIT, STEPS = 3, 5  # steps of this start before the trace (libraries choose their kernels), and within


class Trace:
    """Writes `<folder>/trace-rank<r>.json` once `step` has been called often enough; does nothing where it is not `wanted`."""

    def __init__(self, folder: Path, wanted: bool) -> None:
        self.path = folder / f"trace-rank{rank()}.json"
        self._profiler: Any = None
        if not wanted:
            return
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=WAIT - 1, warmup=1, active=STEPS, repeat=1), on_trace_ready=self._write
        )
        self._profiler.start()

    def _write(self, profiler: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}")
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, self.path)
        print(f"trace of {STEPS} steps: {self.path}", flush=True)

    def step(self) -> None:
        """An optimiser step is over."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """The stage is over; a trace that was begun is written."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
