"""One training loop for all stages: forward, global CCC loss, step, validate, save (DESIGN section 10)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jmt_dist.config import EngineOptions, TrainOptions
from jmt_dist.data.pipeline import derive_seed
from jmt_dist.errors import UserError
from jmt_dist.model.batchnorm import average_buffers
from jmt_dist.track import names
from jmt_dist.train import stop
from jmt_dist.train.ccc import ccc_loss, ccc_over_ranks, moments
from jmt_dist.train.checkpoint import Checkpoints, save_weights
from jmt_dist.train.engine import make_engine
from jmt_dist.train.ranks import barrier, rank, sum_over_ranks, world

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
    status: Callable[..., None]  # stage, epoch, step, steps, score for people who watch


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The result of a stage that is done with this key, else None."""
    try:
        result: dict[str, Any] = json.loads((folder / "done.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return result if result.get("key") == key else None


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file under its final name by one rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


class Trainer:
    """Trains one stage to its end, from its newest checkpoint where there is one."""

    def __init__(self, stage: Stage, around: Surroundings) -> None:
        self.stage, self.around, self.options = stage, around, stage.options
        # an optimiser step takes `accumulation` micro-batches; what is left of an epoch after whole steps is not used
        self.steps_per_epoch = stage.loader.steps // self.options.accumulation
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{stage.name} has {stage.loader.steps} batches per epoch, fewer than accumulation={self.options.accumulation}",
                "Lower the accumulation or the batch.",
            )
        limit = self.options.max_steps or math.inf
        self.total = int(min(limit, self.options.max_epochs * self.steps_per_epoch))
        torch.manual_seed(derive_seed("dropout", stage.seed, rank()))
        self.engine = make_engine(
            stage.model,
            engine=around.engine,
            optimizer=self.options.optimizer,
            schedule=self.options.schedule,
            steps=self.total,
            micro_batch=stage.micro_batch,
            accumulation=self.options.accumulation,
            device=around.device,
        )
        self.checkpoints = Checkpoints(stage.folder / "checkpoints", stage.key, self.options.keep, around.device)
        self.progress = Progress()

    def run(self) -> dict[str, Any]:
        """Train, and return the result that `done.json` holds: key, score, epochs, steps."""
        self._resume()
        while not self.progress.finished:
            self._epoch()
            self._validate()
            self._save()
        result = {
            "key": self.stage.key,
            "score": self.progress.best,
            "best_step": self.progress.best_step,
            "epochs": self.progress.epoch,
            "steps": self.progress.step,
            "unlabelled_steps": self.progress.unlabelled,
            "scores": self.progress.scores,
        }
        if rank() == 0:
            write_json(self.stage.folder / "done.json", result)
        barrier()
        self.engine.destroy()
        return result

    def _resume(self) -> None:
        saved = self.checkpoints.load(self.engine)
        if saved is not None:
            self.progress = Progress(**saved.progress)
            if saved.same_world:
                self.stage.loader.restore(saved.loaders[0])
            else:  # the batch is that of all ranks together, so steps done stay steps done
                self.stage.loader.redivide(saved.loaders)
                torch.manual_seed(derive_seed("dropout", self.stage.seed, rank(), self.progress.step))
            if rank() == 0:
                how = "" if saved.same_world else f", written by {len(saved.loaders)} ranks: the rest of the epoch is divided anew"
                print(f"{self.stage.name}: goes on from {saved.folder}{how}", flush=True)

    def _epoch(self) -> None:
        self.engine.train()
        progress = self.progress
        for index, batch in enumerate(self.stage.loader.batches(progress.epoch, progress.done), progress.done + 1):
            boundary = self._micro_step(batch)
            progress.done = index
            if not boundary:
                continue
            progress.step += 1
            self._report()
            if progress.step >= self.total:
                break
            self._act_on_requests()
            if index // self.options.accumulation >= self.steps_per_epoch:
                break
        progress.done = 0
        progress.epoch += 1

    def _micro_step(self, batch: Batch) -> bool:
        """Forward, backward and, at the end of an accumulation, the optimiser step; True then."""
        draw = torch.Generator().manual_seed(derive_seed("draw", self.stage.seed, self.progress.epoch, self.progress.done))
        prediction, target = self.stage.predict(self.engine, batch, draw)
        loss = ccc_loss(prediction, target)
        value = float(loss.value.detach())
        self._refuse_nonfinite(value, batch)
        self.engine.backward(loss.value)
        boundary = bool(self.engine.is_gradient_accumulation_boundary())
        self.engine.step()
        if int(loss.labels.min()) < 2:
            self.progress.unlabelled += 1
        self.progress.loss_sum += value
        self.progress.loss_steps += 1
        return boundary

    def _refuse_nonfinite(self, value: float, batch: Batch) -> None:
        # the loss is the same number on every rank, so all of them stop here together
        if not math.isfinite(value):
            ids = [tuple(row[:3]) for row in batch["id"].tolist()]
            raise UserError(
                f"{self.stage.name}: the loss is {value} at step {self.progress.step + 1}, samples (unit, segment, phase) {ids}",
                "Lower the learning rate or use engine.precision=fp32; the last checkpoint is untouched.",
            )

    def _report(self) -> None:
        progress = self.progress
        if progress.step % 10 == 0 or progress.step == self.total:
            metrics = {names.LOSS: progress.loss_sum / progress.loss_steps, names.RATE: self._rate()}
            if progress.unlabelled:
                metrics[names.UNLABELLED] = float(progress.unlabelled)
            self._log(metrics)
        self._status()

    def _log(self, metrics: dict[str, float]) -> None:
        self.around.log({f"{self.stage.name}/{name}": value for name, value in metrics.items()}, self.progress.step)

    def _rate(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def _status(self) -> None:
        best = self.progress.best
        self.around.status(
            stage=self.stage.name,
            epoch=self.progress.epoch,
            step=self.progress.step,
            steps=self.total,
            score=best if math.isfinite(best) else None,
        )

    def _act_on_requests(self) -> None:
        wanted = stop.requested()
        flags = torch.tensor(float(bool(wanted)), device=self.around.device)
        if float(sum_over_ranks(flags)) > 0:
            self._save()
            raise stop.Stopped(wanted or "another rank was asked to stop")
        if self.options.save_steps and self.progress.step % self.options.save_steps == 0:
            self._save()

    @torch.no_grad()
    def _validate(self) -> None:
        self.engine.eval()
        average_buffers(self.engine.module)  # ranks must score, and save, one and the same model
        sums = torch.zeros(2, 6, dtype=torch.float64, device=self.around.device)
        for batch in self.stage.validation():
            prediction, target = self.stage.validate(self.engine, batch)
            sums += moments(prediction, target)
        valence, arousal = (float(value) for value in ccc_over_ranks(sums))
        score, progress = (valence + arousal) / 2, self.progress
        progress.scores.append([progress.step, valence, arousal])
        self._log({**names.ccc("val", (valence, arousal, score)), names.BEST: max(score, progress.best)})
        progress.loss_sum, progress.loss_steps = 0.0, 0
        if score > progress.best:
            progress.best, progress.best_step, progress.stale = score, progress.step, 0
            save_weights(self.engine, self.stage.folder / "best.safetensors")
        else:
            progress.stale += 1
        out_of_time = progress.step >= self.total or progress.epoch >= self.options.max_epochs
        progress.finished = out_of_time or progress.stale >= self.options.patience
        self._status()

    def _save(self) -> None:
        self.checkpoints.save(self.engine, self.progress.step, asdict(self.progress), self.stage.loader.state())


def train(stage: Stage, around: Surroundings) -> dict[str, Any]:
    """Train a stage, or return its result where it is already done with the same key."""
    result = finished(stage.folder, stage.key)
    return result if result is not None else Trainer(stage, around).run()


__all__ = ["Loader", "Progress", "Stage", "Surroundings", "Trainer", "finished", "train", "world", "write_json"]
