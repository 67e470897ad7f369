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
from jmt_dist.train.forecast import Forecast
from jmt_dist.train.meter import EVERY, Meter, Pace
from jmt_dist.train.ranks import any_rank, barrier, rank, world
from jmt_dist.train.trace import Trace

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
    status: Callable[..., None]  # stage, epoch, step, steps, score for people who watch; hours left where they are known
    profile: bool = False  # write a trace of a few steps of each stage


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
        self.forecast: Forecast | None = Forecast(stage.model, around.engine, self.options.optimizer, world()) if rank() == 0 else None
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
        self.meter = Meter(stage.name, around.device)
        self.pace: Pace | None = None  # as last measured
        self.trace = Trace(stage.folder, around.profile)

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
        batches = self.meter.waiting(self.stage.loader.batches(progress.epoch, progress.done))
        for index, batch in enumerate(batches, progress.done + 1):
            self._say_needs(batch)
            boundary = self._micro_step(batch)
            progress.done = index
            if not boundary:
                continue
            progress.step += 1
            self.trace.step()
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
        self.meter.add(loss, self.progress.step + 1, batch["id"])
        if not self.meter.deferred:
            self._read()
        self.engine.backward(loss.value)
        boundary = bool(self.engine.is_gradient_accumulation_boundary())
        self.engine.step()
        return boundary

    def _read(self) -> None:
        """Take the losses of the steps since the last reading; a loss that is no number ends the training here."""
        for value, labelled in self.meter.read():
            self.progress.unlabelled += not labelled
            self.progress.loss_sum += value
            self.progress.loss_steps += 1

    def _say_needs(self, batch: Batch) -> None:
        """Before the first step: what the stage takes."""
        if self.forecast is not None:
            need = self.forecast.need(self.stage.predict, batch, self.around.device)
            print(f"{self.stage.name}: {need.line(self.stage.micro_batch, self.total)}", flush=True)
            self.forecast = None

    def _report(self) -> None:
        progress = self.progress
        if progress.step % EVERY == 0 or progress.step == self.total:
            self._read()
            metrics = {names.LOSS: progress.loss_sum / progress.loss_steps, names.RATE: self._rate()}
            if progress.unlabelled:
                metrics[names.UNLABELLED] = float(progress.unlabelled)
            self._log({**metrics, **self._measure()})
        self._status()

    def _measure(self) -> dict[str, float]:
        """The pace of the last ten steps; the first one measured is said, with the hours it means."""
        pace = self.meter.pace(self.progress.step)
        if pace is None:
            return {}
        if self.pace is None and rank() == 0:
            print(
                f"{self.stage.name}: {pace.steps_per_s:.3g} steps/s, {pace.data_wait:.1%} of the time waiting for data: "
                f"about {_time((self.total - self.progress.step) / pace.steps_per_s)} for the rest, validation not counted",
                flush=True,
            )
        self.pace = pace
        return {names.WAIT: pace.data_wait, names.SPEED: pace.steps_per_s}

    def _log(self, metrics: dict[str, float]) -> None:
        self.around.log({f"{self.stage.name}/{name}": value for name, value in metrics.items()}, self.progress.step)

    def _rate(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def _status(self) -> None:
        best = self.progress.best
        left = {"hours": round((self.total - self.progress.step) / self.pace.steps_per_s / 3600, 3)} if self.pace else {}
        self.around.status(
            stage=self.stage.name,
            epoch=self.progress.epoch,
            step=self.progress.step,
            steps=self.total,
            score=best if math.isfinite(best) else None,
            **left,
        )

    def _act_on_requests(self) -> None:
        wanted = stop.requested()
        if any_rank(bool(wanted), self.around.device):
            self._save()
            raise stop.Stopped(wanted or "another rank was asked to stop")
        if self.options.save_steps and self.progress.step % self.options.save_steps == 0:
            self._save()

    @torch.no_grad()
    def _validate(self) -> None:
        self._read()
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
        self._read()  # nothing is saved after a loss that was no number
        self.checkpoints.save(self.engine, self.progress.step, asdict(self.progress), self.stage.loader.state())


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"


def train(stage: Stage, around: Surroundings) -> dict[str, Any]:
    """Train a stage, or return its result where it is already done with the same key."""
    result = finished(stage.folder, stage.key)
    if result is not None:
        return result
    trainer = Trainer(stage, around)
    try:
        return trainer.run()
    finally:
        trainer.trace.close()


__all__ = ["Loader", "Progress", "Stage", "Surroundings", "Trainer", "finished", "train", "world", "write_json"]
