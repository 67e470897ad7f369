"""What a training loop measures of itself: its losses, read in groups, the time it waits for data, its rate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from jmt_dist.errors import UserError
from jmt_dist.train.ccc import Loss

EVERY = 10  # optimiser steps between readings, which are what is logged
T = TypeVar("T")


@dataclass(frozen=True)
class Pace:
    """Of the optimiser steps since the last one was taken: steps per second, and the share of the time spent waiting for data."""

    steps_per_s: float
    data_wait: float


class Meter:
    """Losses stay on their device until `read`: a GPU is waited for once in ten steps. On a CPU reading is free, and done at once."""

    def __init__(self, stage: str, device: torch.device, deferred: bool | None = None) -> None:
        self.stage, self.deferred = stage, device.type != "cpu" if deferred is None else deferred
        self._values: list[Tensor] = []
        self._origins: list[tuple[int, Tensor]] = []
        self._begin, self._waited, self._step = time.perf_counter(), 0.0, -1

    def add(self, loss: Loss, step: int, ids: Tensor) -> None:
        """A micro-step's loss, made of samples `ids` [B, 4]; `step` is the optimiser step it is part of, from 1."""
        self._values.append(torch.stack([loss.value.detach(), loss.labels.min()]))
        self._origins.append((step, ids))

    def read(self) -> list[tuple[float, bool]]:
        """(loss, whether it had two labels per target) of each micro-step since the last call.

        Raises UserError where a loss is not a number: on every rank, since all have the same one. Whoever saves reads first.
        """
        if not self._values:
            return []
        values = torch.stack(self._values).tolist()
        origins, self._values, self._origins = self._origins, [], []
        for (value, _), (step, ids) in zip(values, origins, strict=True):
            if not math.isfinite(value):
                samples = [tuple(row[:3]) for row in ids.tolist()]
                raise UserError(
                    f"{self.stage}: the loss is {value} at step {step}, samples (unit, segment, phase) {samples}",
                    "Lower the learning rate or use engine.precision=fp32; the last checkpoint is untouched.",
                )
        return [(value, labels >= 2) for value, labels in values]

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; the time until each is there counts as waiting."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - start
            yield batch

    def pace(self, step: int) -> Pace | None:
        """The pace since the last call; None the first time, which only starts the clock. Call it after `read`."""
        now, steps = time.perf_counter(), step - self._step
        seconds, waited, known = now - self._begin, self._waited, self._step >= 0
        self._begin, self._waited, self._step = now, 0.0, step
        return Pace(steps / seconds, waited / seconds) if known and steps > 0 and seconds > 0 else None
