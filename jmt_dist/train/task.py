"""What a stage gives the training loop, and what the loop keeps of where it is (DESIGN section 10)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jmt_dist.config import EngineOptions, TrainOptions
from jmt_dist.train.watch import Watch

Batch = dict[str, Tensor]


class Loader(Protocol):
    """Training batches of one rank; every rank makes the same number of steps."""

    steps: int

    def batches(self, epoch: int, done: int) -> Iterator[Batch]:
        """The steps of an epoch after the first `done`."""

    def state(self) -> dict[str, Any]:
        """The position after the batch last returned."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a position."""

    def redivide(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from where a job of another number of ranks stopped, given the states of all its ranks."""


@dataclass(frozen=True)
class Stage:
    """What one stage trains.

    `predict(model, batch, generator)` gives prediction and target [..., 2] of a training batch (`generator` seeds what it draws);
    `validate(model, batch)` the same for a batch of `validation()`. `key` names everything the result depends on.
    """

    name: str
    folder: Path
    key: str
    model: nn.Module
    options: TrainOptions
    micro_batch: int
    loader: Loader
    predict: Callable[[nn.Module, Batch, torch.Generator], tuple[Tensor, Tensor]]
    validation: Callable[[], Iterable[Batch]]
    validate: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
    seed: int


@dataclass
class Progress:
    """Where the loop is; saved with each checkpoint."""

    epoch: int = 0
    step: int = 0  # optimiser steps in all
    done: int = 0  # batches of the current epoch already used
    best: float = -math.inf
    best_step: int = 0
    stale: int = 0  # epochs since the best score
    weights: str = ""  # SHA-256 of the best weights
    finished: bool = False
    unlabelled: int = 0  # steps that had fewer than two labels
    loss_sum: float = 0.0  # of the current epoch, for the curve
    loss_steps: int = 0
    scores: list[list[float]] = field(default_factory=list)  # [step, valence, arousal] per epoch


@dataclass(frozen=True)
class Surroundings:
    """What a stage needs of its job: the engine's options, the device, and where to report to."""

    engine: EngineOptions
    device: torch.device
    log: Callable[[dict[str, float], int], None]  # metrics at a step
    status: Callable[..., None]  # stage, epoch, step, steps, score for people who watch; hours left where they are known
    profile: bool = False  # write a trace of a few steps of each stage
    watch: Watch = field(default_factory=Watch)  # ends a rank that hangs
