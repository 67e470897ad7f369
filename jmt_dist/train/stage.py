"""One training loop for all stages: forward, global CCC loss, step, validate, save (DESIGN section 10)."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from jmt_dist.data.pipeline import derive_seed
from jmt_dist.errors import UserError
from jmt_dist.model.batchnorm import average_buffers
from jmt_dist.track import names
from jmt_dist.train import stop
from jmt_dist.train.ccc import Loss, ccc_over_ranks
from jmt_dist.train.checkpoint import Checkpoints
from jmt_dist.train.engine import make_engine
from jmt_dist.train.forecast import Forecast
from jmt_dist.train.meter import EVERY, Meter, Pace
from jmt_dist.train.ranks import any_rank, barrier, first_word, from_first, rank, world
from jmt_dist.train.results import done, finished, write_json
from jmt_dist.train.step import take_step
from jmt_dist.train.task import Batch, Loader, Progress, Stage, Surroundings
from jmt_dist.train.trace import Trace
from jmt_dist.train.validation import validation_moments
from jmt_dist.train.weights import BEST, full_weights, write_weights


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
        self._best: dict[str, Tensor] = {}  # weights that are still to be written, on rank 0

    def run(self) -> dict[str, Any]:
        """Train, and return the result that `done.json` holds: key, score, epochs, steps."""
        self._resume()
        while not self.progress.finished:
            self._epoch()
            self._validate()
            self._save()
        self._write_result()
        barrier()
        self.engine.destroy()
        return self._result()

    def _result(self) -> dict[str, Any]:
        return {
            "key": self.stage.key,
            "score": self.progress.best,
            "best_step": self.progress.best_step,
            "weights": self.progress.weights,
            "epochs": self.progress.epoch,
            "steps": self.progress.step,
            "unlabelled_steps": self.progress.unlabelled,
            "scores": self.progress.scores,
        }

    def _write_result(self) -> None:
        problem = self._write_best()
        if rank() == 0 and not problem:
            try:
                write_json(self.stage.folder / "done.json", self._result())
            except OSError as error:
                problem = str(error)
        problem = first_word(problem)
        if problem:
            raise UserError(
                f"the result of {self.stage.name} cannot be written to {self.stage.folder} ({problem})",
                "Make room there; the same command goes on from the last checkpoint.",
            )

    def _resume(self) -> None:
        saved = self.checkpoints.load(self.engine)
        if saved is None and any_rank(rank() == 0 and (self.stage.folder / "done.json").exists(), self.around.device):
            raise UserError(
                f"{self.stage.folder} holds a result that is damaged, and no checkpoint to make it from again",
                "Move the folder away to train this stage from its beginning.",
            )
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
        progress, size = self.progress, self.options.accumulation
        batches = self.meter.waiting(self.stage.loader.batches(progress.epoch, progress.done))
        while progress.done // size < self.steps_per_epoch:
            self._beat("waiting for a batch", alone=True)
            taken = list(islice(batches, size))
            self._say_needs(taken[0])
            self._beat("in the step")
            self._step(taken)
            progress.done += size
            progress.step += 1
            self.trace.step()
            self._report()
            if progress.step >= self.total:
                break
            self._act_on_requests()
        progress.done = 0
        progress.epoch += 1

    def _step(self, batches: list[Batch]) -> None:
        """One optimiser step over the micro-batches of an accumulation."""
        stage, progress = self.stage, self.progress

        def predict(k: int, batch: Batch) -> tuple[Tensor, Tensor]:
            draw = torch.Generator().manual_seed(derive_seed("draw", stage.seed, progress.epoch, progress.done + k))
            return stage.predict(self.engine, batch, draw)

        def seen(loss: Loss, ids: Tensor) -> None:
            self.meter.add(loss, progress.step + 1, ids)
            if not self.meter.deferred:
                self._read()

        take_step(self.engine, batches, predict, self.options.accumulated_loss, seen)

    def _read(self) -> None:
        """Take the losses of the steps since the last reading; a loss that is no number ends the training here."""
        for value, labelled in self.meter.read():
            self.progress.unlabelled += not labelled
            self.progress.loss_sum += value
            self.progress.loss_steps += 1

    def _say_needs(self, batch: Batch) -> None:
        """Before the first step: what the stage takes."""
        if self.forecast is not None:
            try:
                need = self.forecast.need(self.stage.predict, batch, self.around.device).line(self.stage.micro_batch, self.total)
            except Exception as error:  # a forecast without numbers cannot follow what looks at them; that must not end the training
                need = f"what it takes cannot be told before it runs ({type(error).__name__})"
            print(f"{self.stage.name}: {need}", flush=True)
            self.forecast = None

    def _beat(self, doing: str, *, alone: bool = False) -> None:
        progress = self.progress
        self.around.watch.beat(f"{self.stage.name}, epoch {progress.epoch}, step {progress.step + 1}, {doing}", alone=alone)

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
        if any_rank(bool(stop.requested()), self.around.device):
            self._save()
            raise stop.Stopped(stop.requested() or "another rank was asked to stop")
        if self.options.save_steps and self.progress.step % self.options.save_steps == 0:
            self._save()

    @torch.no_grad()
    def _validate(self) -> None:
        self._read()
        self.engine.eval()
        self._beat("before validation")
        average_buffers(self.engine.module)  # ranks must score, and save, one and the same model
        beat = lambda: self._beat("in validation")  # noqa: E731
        sums = validation_moments(self.engine, self.stage.validation(), self.stage.validate, beat)
        valence, arousal = (float(value) for value in ccc_over_ranks(sums))
        score, progress = (valence + arousal) / 2, self.progress
        if not math.isfinite(score):
            raise UserError(
                f"{self.stage.name}: the validation score after step {progress.step} is {score}",
                "Lower the learning rate or use engine.precision=fp32; the last checkpoint is untouched.",
            )
        progress.scores.append([progress.step, valence, arousal])
        self._log({**names.ccc("val", (valence, arousal, score)), names.BEST: max(score, progress.best)})
        progress.loss_sum, progress.loss_steps = 0.0, 0
        if score > progress.best:
            progress.best, progress.best_step, progress.stale = score, progress.step, 0
            self._best = full_weights(self.engine)
        else:
            progress.stale += 1
        out_of_time = progress.step >= self.total or progress.epoch >= self.options.max_epochs
        progress.finished = out_of_time or progress.stale >= self.options.patience
        self._status()

    def _write_best(self) -> str:
        """Write the best weights where they are not written yet; why they cannot be, on rank 0, or an empty string."""
        if not self._best:
            return ""
        try:
            self.progress.weights = write_weights(self._best, self.stage.folder / BEST)
        except OSError as error:
            return str(error)
        self._best = {}
        return ""

    def _save(self) -> None:
        self._read()  # nothing is saved after a loss that was no number
        with self.around.watch.paused():
            problem = first_word(self._write_best())
            if problem:  # a checkpoint counts on the weights it calls the best: not without them
                if rank() == 0:
                    print(
                        f"{self.stage.name}: the best weights could not be written ({problem}); training goes on and tries again",
                        flush=True,
                    )
                return
            self.checkpoints.save(self.engine, self.progress.step, asdict(self.progress), self.stage.loader.state())


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"


def train(stage: Stage, around: Surroundings) -> dict[str, Any]:
    """Train a stage, or return its result where it is already done with the same key."""
    # the first rank's word: on a network file system the others may see a result later than it, or still see one that is gone
    result: dict[str, Any] | None = from_first(done(stage.folder, stage.key) if rank() == 0 else None)
    if result is not None:
        return result
    trainer = Trainer(stage, around)
    try:
        return trainer.run()
    finally:
        trainer.trace.close()


__all__ = ["Loader", "Progress", "Stage", "Surroundings", "Trainer", "done", "finished", "train", "world", "write_json"]
