"""The visual and audio stages: backbones trained on clips and on spectrograms (paper, section 4.2)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jmt_dist.data.geometry import CLIPS, PHASES
from jmt_dist.data.passes import Passes
from jmt_dist.data.pipeline import ClipLoader, clips
from jmt_dist.data.redivide import write_phases
from jmt_dist.data.shards import ShardSet
from jmt_dist.model.batchnorm import prepare
from jmt_dist.model.heads import AudioModel, VisualModel
from jmt_dist.model.weights import load_initial
from jmt_dist.train.division import micro_batch
from jmt_dist.train.engine import input_type
from jmt_dist.train.plan import FoldPlan
from jmt_dist.train.ranks import from_first, rank, world
from jmt_dist.train.stage import Batch, Stage


def visual_stage(plan: FoldPlan) -> Stage:
    """R(2+1)D on face clips: SGD, random crop and flip, dropout in the head."""
    options = plan.recipe.visual
    kind = input_type(plan.recipe.engine)

    def predict(model: nn.Module, batch: Batch, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        frames, va = clips(batch["frames"]), batch["va"]
        if options.clips_per_subsequence < CLIPS:
            chosen = torch.randperm(CLIPS, generator=draw)[: options.clips_per_subsequence].sort().values.to(va.device)
            frames, va = frames[:, chosen], va[:, chosen]
        return model(frames.to(kind))[1], va

    def validate(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        found = [model(clips(batch["frames"], offset).to(kind))[1] for offset in options.validation_offsets]
        return torch.stack(found, dim=1), batch["va"]

    model = _initial(plan, "visual", VisualModel, options)
    training = {"size": options.size, "crop": options.crop, "flip": options.flip, "streams": ("visual",)}
    dense = {"size": options.size, "streams": ("visual",), "offsets": options.validation_offsets}
    return _stage(plan, "visual", model, training, dense, predict, validate)


def audio_stage(plan: FoldPlan) -> Stage:
    """ResNet-18 and GRU on the 8 spectrograms of a subsequence: Adam."""
    options = plan.recipe.audio
    kind = input_type(plan.recipe.engine)

    def predict(model: nn.Module, batch: Batch, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return model(batch["mel"].to(kind))[1], batch["va"]

    def validate(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        found = [model(batch["mel"][:, place].to(kind))[1] for place in range(len(options.validation_offsets))]
        return torch.stack(found, dim=1), batch["va"]

    model = _initial(plan, "audio", AudioModel, options)
    dense = {"streams": ("audio",), "offsets": options.validation_offsets}
    return _stage(plan, "audio", model, {"streams": ("audio",)}, dense, predict, validate)


def training_shards(plan: FoldPlan, folder: Path, phases: Sequence[int]) -> ShardSet:
    """The training samples of some phases; where they are not all, their index files lie in the stage's folder. Collective."""
    shards = plan.parts["train"]
    if set(phases) == set(range(PHASES)):
        return shards
    chosen = folder / "phases"
    if rank() == 0:
        shutil.rmtree(chosen, ignore_errors=True)
        chosen.mkdir()
    found: ShardSet = from_first(write_phases(shards, phases, chosen) if rank() == 0 else None)
    own = {tar.name: tar for tar in shards.tars}  # a node's copies (site.staging) may lie elsewhere than the first one's
    return replace(found, tars=tuple(own[tar.name] for tar in found.tars))


def _initial(plan: FoldPlan, name: str, make: Any, options: Any) -> nn.Module:
    """The stage's model with its initial weights, its BatchNorm as the recipe wants it."""
    model = plan.model(lambda: make(options), name, options.seed)
    loaded = load_initial(model, options)  # type: ignore[arg-type]
    if rank() == 0:
        print(f"{plan.fold} {name}: starts from {loaded}", flush=True)
    return prepare(model, options.batchnorm)


def _stage(
    plan: FoldPlan, name: str, model: nn.Module, training: dict[str, Any], dense: dict[str, Any], predict: Any, validate: Any
) -> Stage:
    options = plan.recipe.visual if name == "visual" else plan.recipe.audio
    micro = micro_batch(name, options.batch, world(), options.accumulation)
    common: dict[str, Any] = {
        "data": plan.recipe.data, "label": plan.recipe.label, "rank": rank(), "world": world(), "device": plan.device
    }  # fmt: skip
    seed = plan.seed(name, options.seed)

    def validation() -> Iterator[Batch]:
        return ClipLoader(plan.parts["validation"], batch=micro, **common, **dense).batches()

    return Stage(
        name=name,
        folder=plan.folder / name,
        key=plan.key(name),
        model=model,
        options=options,
        micro_batch=micro,
        loader=Passes(
            ClipLoader(training_shards(plan, plan.folder / name, options.phases), batch=micro, seed=seed, **common, **training),
            options.offsets_per_epoch,
        ),
        predict=predict,
        validation=validation,
        validate=validate,
        seed=seed,
    )
