"""What a trained fusion model is, besides its scores: size, time, and how much of its attention is saturated."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jmt_dist.config import FusionModel
from jmt_dist.data.features import FeatureSet
from jmt_dist.data.geometry import CLIPS
from jmt_dist.model.attention import WIDTH
from jmt_dist.model.saturation import watch_saturation
from jmt_dist.model.zoo import make_fusion
from jmt_dist.track import names
from jmt_dist.train.engine import autocast
from jmt_dist.train.fuse import fusion_folder, subsequences
from jmt_dist.train.plan import FoldPlan
from jmt_dist.train.stage import write_json
from jmt_dist.train.weights import load_weights

WATCHED = 64  # subsequences of the validation part in which attention weights are counted
TIMED = 125  # subsequences, 1,000 clips, of one timed pass
ROUNDS = 5


def trained(plan: FoldPlan, model: FusionModel, seed: int) -> nn.Module:
    """A fusion model of this fold with its best weights, on the fold's device, in evaluation mode."""
    net = make_fusion(plan.recipe.fusion.model_copy(update={"model": model}))
    load_weights(net, fusion_folder(plan, model, seed) / "best.safetensors")
    return net.to(plan.device).eval()


def untrained(plan: FoldPlan, model: FusionModel, seed: int) -> nn.Module:
    """The same model as its training began."""
    options = plan.recipe.fusion
    return plan.model(lambda: make_fusion(options.model_copy(update={"model": model})), f"fusion/{model}", options.seed + seed)


def saturation(plan: FoldPlan, model: FusionModel, seed: int, validation: FeatureSet) -> dict[str, float]:
    """{start, end}: share of attention weights below 0.05 or above 0.95 before training and of the best weights; this process alone.

    Counted on the first validation subsequences. Empty for a model without attention. Counted and logged once, then read from
    `saturation.json` beside the weights.
    """
    folder, key = fusion_folder(plan, model, seed), plan.fusion_key(model, seed)
    path = folder / "saturation.json"
    known = _read(path)
    if known.get("key") == key:
        return dict(known["shares"])
    audio, visual = subsequences(validation, WATCHED, plan.device)
    found = {}
    for name, make in (("start", untrained), ("end", trained)):
        net = make(plan, model, seed).to(plan.device).eval()
        with watch_saturation(net) as watched, torch.no_grad(), autocast(plan.recipe.engine.precision, plan.device):
            net(audio, visual)
        if watched.counts:
            found[name] = watched.share
    prefix = f"fusion/{model}-seed{seed}"
    if found:
        plan.around.log({f"{prefix}/{names.SATURATION}_{name}": share for name, share in found.items()}, 0)
    write_json(path, {"key": key, "shares": found})
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


def parameters(net: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


@torch.no_grad()
def ms_per_1000_clips(net: nn.Module, device: torch.device) -> float:
    """Milliseconds of a forward pass of 1,000 clips at float32 on this device: the median of rounds, after one to warm up."""
    generator = torch.Generator().manual_seed(0)
    audio, visual = (torch.randn(TIMED, CLIPS, WIDTH, generator=generator).to(device) for _ in range(2))
    net.eval()
    _timed(net, audio, visual)
    return statistics.median(_timed(net, audio, visual) for _ in range(ROUNDS))


def _timed(net: nn.Module, audio: Tensor, visual: Tensor) -> float:
    start = time.perf_counter()
    net(audio, visual)
    if audio.is_cuda:
        torch.cuda.synchronize(audio.device)
    return (time.perf_counter() - start) * 1000
