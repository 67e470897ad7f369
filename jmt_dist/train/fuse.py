"""The fusion stage: a fusion model on the features of frozen backbones (paper, sections 3 and 4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from jmt_dist.config import FusionModel
from jmt_dist.data.features import FeatureLoader, FeatureSet, read_features
from jmt_dist.data.geometry import LABEL_BACK
from jmt_dist.data.pipeline import derive_seed
from jmt_dist.errors import UserError
from jmt_dist.model.zoo import make_fusion
from jmt_dist.train.division import usable_ranks
from jmt_dist.train.engine import input_type
from jmt_dist.train.plan import FoldPlan
from jmt_dist.train.ranks import rank, world
from jmt_dist.train.stage import Batch, Stage, finished
from jmt_dist.train.stored import stages_missing

CHUNK = 256  # subsequences per forward pass where nothing is trained


def fusion_folder(plan: FoldPlan, model: str, seed: int) -> Path:
    """Where one training of one fusion model lies."""
    return plan.folder / "fusion" / f"{model}-seed{seed}"


def stored_features(plan: FoldPlan, part: str) -> FeatureSet:
    """The features of a part. Raises UserError where they are missing or of another recipe."""
    folder = plan.folder / "features"
    if finished(folder, plan.key("features")) is None:
        raise UserError(f"{folder} holds no features of this recipe", f"Run {stages_missing(plan)} first.")
    return replace(read_features(folder, part, plan.recipe.data.mmap), back=LABEL_BACK[plan.recipe.label])


def fusion_stage(plan: FoldPlan, model: FusionModel, seed: int, train: FeatureSet, validation: FeatureSet) -> Stage:
    """Training of `model` with `seed`; the ranks that the batch does not divide over wait (DESIGN section 2)."""
    options = plan.recipe.fusion
    kind = input_type(plan.recipe.engine)
    most = min(world(), options.ranks or world())
    ranks = usable_ranks(options.batch, most, options.accumulation)
    if ranks == 0:
        raise UserError(
            f"fusion.batch={options.batch} does not divide by fusion.accumulation={options.accumulation}", "Change one of them."
        )
    held = validation.select(options.validation_offsets)

    def predict(net: nn.Module, batch: Batch, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        audio, visual = withhold(batch, options.modality_dropout, draw.initial_seed())
        return net(audio.to(kind), visual.to(kind)), batch["va"]

    def batches() -> Iterator[Batch]:
        return _dense(held, rank(), world(), plan.device)

    made = options.model_copy(update={"model": model})
    own = plan.seed(f"fusion/{model}", options.seed + seed)
    return Stage(
        name=f"fusion/{model}-seed{seed}",
        folder=fusion_folder(plan, model, seed),
        key=plan.fusion_key(model, seed),
        model=plan.model(lambda: make_fusion(made), f"fusion/{model}", options.seed + seed),
        options=options,
        micro_batch=options.batch // (ranks * options.accumulation),
        loader=FeatureLoader(
            train.of_phases(options.phases), batch=options.batch // options.accumulation, passes=options.offsets_per_epoch, seed=own,
            rank=rank(), ranks=ranks, device=plan.device,
        ),
        predict=predict,
        validation=batches,
        validate=lambda net, batch: (net(batch["audio"].to(kind), batch["visual"].to(kind)), batch["va"]),
        seed=own,
    )  # fmt: skip


def withhold(batch: Batch, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Audio and visual features [B, 8, 512] of a training batch; in a `share` of its subsequences one of the two, at random, is 0.

    The draw is a function of the seed and the subsequence's name, so that it does not depend on the division over ranks.
    """
    audio, visual = batch["audio"], batch["visual"]
    if not share:
        return audio, visual
    rows = torch.cat((batch["id"][:, :3].cpu(), batch["q"].cpu()[:, None]), 1).tolist()
    draws = torch.tensor([derive_seed("withhold", seed, *row) for row in rows]).to(audio.device)
    limit = round(share * 2**30)  # 31 bits are drawn: the lowest chooses the modality, the others whether
    gone, which = (draws >> 1) < limit, draws & 1
    return (
        audio.masked_fill((gone & (which == 0))[:, None, None], 0),
        visual.masked_fill((gone & (which == 1))[:, None, None], 0),
    )


def subsequences(features: FeatureSet, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Audio and visual features [B, 8, 512] of the first `count` subsequences at most."""
    batch = next(_dense(features, 0, 1, device))
    return batch["audio"][:count], batch["visual"][:count]


def _dense(features: FeatureSet, first: int, step: int, device: torch.device) -> Iterator[Batch]:
    """All (sample, offset) pairs of `features`, every `step`-th chunk of them from `first`."""
    va, offsets = features.va(), len(features.offsets)
    for begin in range(first * CHUNK, len(va) * offsets, step * CHUNK):
        samples, places = np.divmod(np.arange(begin, min(begin + CHUNK, len(va) * offsets)), offsets)
        visual, audio = features.take(samples, places)
        found = {"visual": visual, "audio": audio, "va": va[samples, places]}
        yield {name: torch.from_numpy(values).to(device) for name, values in found.items()}


@torch.no_grad()
def predict_all(net: nn.Module, features: FeatureSet, device: torch.device, withheld: str = "") -> np.ndarray:
    """Predictions [S, O, 8, 2] of a fusion model for all samples and offsets of `features`; this process alone.

    `withheld`: the modality, "audio" or "visual", whose features are 0, as where it is missing.
    """
    net.eval()
    parts = []
    for batch in _dense(features, 0, 1, device):
        audio, visual = (torch.zeros_like(batch[name]) if name == withheld else batch[name] for name in ("audio", "visual"))
        parts.append(net(audio, visual).float().cpu().numpy())
    return np.concatenate(parts).reshape(len(features.ident), len(features.offsets), 8, 2)
