"""How much of a model's attention is saturated: weights so near 0 or 1 that they hardly learn any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from jmt_dist.model.attention import Attention, Observer
from jmt_dist.model.cross import CrossAttentions
from jmt_dist.model.zoo_attention import LeaderFollower

LOW, HIGH = 0.05, 0.95  # a weight outside is saturated: a sigmoid's slope there is less than a fifth of its largest


@dataclass
class Saturation:
    """What `watch_saturation` counted, per attention module: saturated weights, all weights (tensors, unsynchronised)."""

    counts: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """Share of saturated weights of each attention module that ran."""
        return {name: float(counts[0] / counts[1].clamp(min=1)) for name, counts in self.counts.items()}

    @property
    def share(self) -> float:
        """Share of saturated weights over all modules; 0.0 where none ran."""
        total = [torch.stack([counts[i] for counts in self.counts.values()]).sum() for i in (0, 1)] if self.counts else []
        return float(total[0] / total[1].clamp(min=1)) if total else 0.0


@contextmanager
def watch_saturation(model: nn.Module) -> Iterator[Saturation]:
    """Count attention weights below 0.05 or above 0.95 in every attention of a model while the block runs.

    Masked columns and, where x and s have one length and so one mask, masked rows do not count.
    """
    result = Saturation()

    def observe(module: str) -> Observer:
        def observer(weights: Tensor, mask: Tensor | None, part: str) -> None:
            name = f"{module}.{part}" if part else module
            valid = torch.ones_like(weights, dtype=torch.bool)
            if mask is not None:
                valid = valid & mask[:, None, None, :]
                if weights.shape[-1] == weights.shape[-2]:
                    valid = valid & mask[:, None, :, None]
            saturated = ((weights < LOW) | (weights > HIGH)) & valid
            old = result.counts.get(name)
            new = [saturated.sum(), valid.sum()]
            result.counts[name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

        return observer

    modules = {name: module for name, module in model.named_modules() if isinstance(module, Attention | CrossAttentions | LeaderFollower)}
    before = {name: module.observer for name, module in modules.items()}
    for name, module in modules.items():
        module.observer = observe(name)
    try:
        yield result
    finally:
        for name, module in modules.items():
            module.observer = before[name]
