"""Training of the whole pipeline, end to end, from the three trained parts: both backbones and the fusion (finetune=true).

The paper freezes the backbones during fusion (section 4.2), so the frozen result stays a fold's result, and this one stands beside
it: as `<model>-finetuned` among the fold's baselines, with weights in `<fold>/finetune/<model>-seed<n>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from jmt_dist.data.features import FeatureSet, read_features
from jmt_dist.data.passes import Passes
from jmt_dist.data.pipeline import ClipLoader, clips
from jmt_dist.errors import UserError
from jmt_dist.model.batchnorm import prepare
from jmt_dist.model.zoo import make_fusion
from jmt_dist.train.backbone import training_shards
from jmt_dist.train.division import micro_batch
from jmt_dist.train.engine import input_type
from jmt_dist.train.extract import already_whole, trained_backbones, write_features
from jmt_dist.train.fuse import fusion_folder
from jmt_dist.train.plan import FoldPlan, claim, make_key, telling
from jmt_dist.train.ranks import rank, world
from jmt_dist.train.stage import Batch, Stage, finished
from jmt_dist.train.weights import load_weights


class EndToEnd(nn.Module):
    """Frames and spectrograms to valence and arousal: the backbones without their own heads, and a fusion model."""

    def __init__(self, visual: nn.Module, audio: nn.Module, fusion: nn.Module) -> None:
        super().__init__()
        self.visual, self.audio, self.fusion = visual, audio, fusion

    def forward(self, frames: Tensor, mel: Tensor) -> Tensor:
        """Frames [B, C, 3, 8, H, W] and spectrograms [B, C, 64, T] of C clips → (valence, arousal) [B, C, 2]."""
        faces = self.visual(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return cast(Tensor, self.fusion(self.audio(mel), faces))


def finetune_folder(plan: FoldPlan, seed: int) -> Path:
    """Where the training from one seed's fusion lies."""
    return plan.folder / "finetune" / f"{plan.recipe.fusion.model}-seed{seed}"


def finetune_key(plan: FoldPlan, seed: int) -> str:
    """The key of one training: its options, and all that the three parts depend on."""
    recipe = plan.recipe
    parts = plan.fusion_key(recipe.fusion.model, seed)
    return make_key("finetune", telling(recipe.finetuning), recipe.engine.model_dump(), recipe.seed, seed, parts)


def trained_parts(plan: FoldPlan, seed: int) -> EndToEnd:
    """The pipeline as the frozen stages left it."""
    visual, audio = trained_backbones(plan)
    fusion = make_fusion(plan.recipe.fusion)
    load_weights(fusion, fusion_folder(plan, plan.recipe.fusion.model, seed) / "best.safetensors")
    return EndToEnd(visual.backbone, audio.backbone, fusion)


def finetune_stage(plan: FoldPlan, seed: int) -> Stage:
    """Training of all three parts at once on clips; augmentation and input size are the visual stage's."""
    recipe, options = plan.recipe, plan.recipe.finetuning
    kind = input_type(recipe.engine)
    micro = micro_batch("finetuning", options.batch, world(), options.accumulation)
    own = plan.seed("finetune", options.seed + seed)
    place: dict[str, Any] = {"data": recipe.data, "rank": rank(), "world": world(), "device": plan.device}
    common = {**place, "label": recipe.label, "size": recipe.visual.size}

    def predict(net: nn.Module, batch: Batch, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return net(clips(batch["frames"]).to(kind), batch["mel"].to(kind)), batch["va"]

    def validate(net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        places = enumerate(options.validation_offsets)
        found = [net(clips(batch["frames"], offset).to(kind), batch["mel"][:, place].to(kind)) for place, offset in places]
        return torch.stack(found, dim=1), batch["va"]

    def validation() -> Iterator[Batch]:
        return ClipLoader(plan.parts["validation"], batch=micro, offsets=options.validation_offsets, **common).batches()

    return Stage(
        name=f"finetune/{recipe.fusion.model}-seed{seed}",
        folder=finetune_folder(plan, seed),
        key=finetune_key(plan, seed),
        model=prepare(plan.model(lambda: trained_parts(plan, seed), "finetune", seed), options.batchnorm),
        options=options,
        micro_batch=micro,
        loader=Passes(
            ClipLoader(
                training_shards(plan, finetune_folder(plan, seed), options.phases),
                batch=micro, seed=own, crop=recipe.visual.crop, flip=recipe.visual.flip, **common,
            ),
            options.offsets_per_epoch,
        ),
        predict=predict,
        validation=validation,
        validate=validate,
        seed=own,
    )  # fmt: skip


def finetuned(plan: FoldPlan, seed: int) -> EndToEnd:
    """The pipeline with its best weights after `finetune_stage`."""
    net = trained_parts(plan, seed)
    load_weights(net, finetune_folder(plan, seed) / "best.safetensors")
    return net


def finetuned_features(plan: FoldPlan, seed: int) -> None:
    """Store what the fine-tuned backbones say of the units that are evaluated, unless that is done. Collective."""
    folder, key = finetune_folder(plan, seed) / "features", make_key("features", finetune_key(plan, seed))
    parts = [part for part in plan.parts if part != "train"]
    if not already_whole(plan, folder, key, parts):
        claim(folder, key)
        net = finetuned(plan, seed)
        write_features(plan, folder, key, net.visual, net.audio, parts)


def read_finetuned(plan: FoldPlan, seed: int, part: str) -> FeatureSet:
    """The features that `finetuned_features` stored. Raises UserError where they are missing or of another recipe."""
    folder = finetune_folder(plan, seed) / "features"
    if finished(folder, make_key("features", finetune_key(plan, seed))) is None:
        raise UserError(f"{folder} holds no features of this recipe", "Run stages=[fusion] finetune=true first.")
    return read_features(folder, part, plan.recipe.data.mmap)
