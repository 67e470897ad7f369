"""The CCC loss of the global batch (paper, equation 3; DESIGN section 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jmt_dist.train.ranks import sum_over_ranks, world


class _SumOverRanks(torch.autograd.Function):
    """All-reduce by sum, whose adjoint is again an all-reduce by sum.

    Every rank then holds W times its share of the gradient, and DeepSpeed's mean over W ranks gives that of one process.
    """

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def moments(prediction: Tensor, target: Tensor) -> Tensor:
    """Sums [2, 6] of n, x, y, x², y², xy per target over the labelled rows of prediction, target [..., 2]; float64.

    A row without a label (NaN in `target`) adds nothing, and gets no gradient.
    """
    x, y = prediction.reshape(-1, 2).double(), target.reshape(-1, 2).double()
    valid = ~torch.isnan(y)
    n = valid.double()
    x, y = torch.where(valid, x, 0.0), torch.where(valid, y, 0.0)
    return torch.stack([n, x, y, x * x, y * y, x * y]).sum(dim=1).T


def ccc(sums: Tensor) -> Tensor:
    """Lin's CCC [2] from `moments`: 2 cov / (var_x + var_y + (mean_x - mean_y)²), population moments; 0 where both are constant."""
    n, x, y, xx, yy, xy = sums.unbind(dim=1)
    n = n.clamp(min=1)
    mx, my = x / n, y / n
    covariance = xy / n - mx * my
    spread = (xx / n - mx * mx).clamp(min=0) + (yy / n - my * my).clamp(min=0) + (mx - my) ** 2
    # 1e-12: below the rounding of these sums a spread is 0, and its quotient would be noise; a NaN must stay one
    return torch.where(spread <= 1e-12, torch.zeros_like(spread), 2 * covariance / spread.clamp(min=1e-12))


@dataclass(frozen=True)
class Loss:
    """value: the loss to differentiate; ccc: detached [2]; labels: labelled rows per target over all ranks [2]."""

    value: Tensor
    ccc: Tensor
    labels: Tensor


def ccc_loss(prediction: Tensor, target: Tensor) -> Loss:
    """(1 - CCC_V) + (1 - CCC_A) of the global batch; prediction, target [..., 2], NaN in `target` = no label.

    Collective: every rank calls it equally often. With fewer than two labels over all ranks a target's part is 0, with gradient 0.
    """
    sums = moments(prediction, target)
    return loss_of_sums(_SumOverRanks.apply(sums) if world() > 1 else sums)


def loss_of_sums(sums: Tensor) -> Loss:
    """The same from the `moments` [2, 6] of the whole batch."""
    values, labels = ccc(sums), sums[:, 0].detach()
    parts = torch.where(labels >= 2, 1 - values, values * 0)
    return Loss(parts.sum(), values.detach(), labels)


def ccc_over_ranks(sums: Tensor) -> Tensor:
    """CCC [2] of accumulated `moments` of all ranks, for validation."""
    return ccc(sum_over_ranks(sums.detach()))
