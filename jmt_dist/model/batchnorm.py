"""BatchNorm under data parallelism: `frozen`, `local` or `sync` (DESIGN section 8).

Neither DeepSpeed nor a checkpoint of rank 0 carries the other ranks' running statistics, and torch's own
SyncBatchNorm refuses CPU tensors. Parameters and buffers keep their names and identities in all three modes, so a
state dict of one loads into another.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class LocalBatchNorm(_BatchNorm):
    """torch's BatchNorm, but its weight and bias may be of a narrower type than its statistics.

    bf16 and fp16 engines make parameters so and leave buffers in float32, which torch refuses.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        _check_dimensions(input)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, …] → the same shape."""
        if self.weight is None or self.running_mean is None or self.weight.dtype == self.running_mean.dtype:
            return super().forward(input)
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else momentum
        return F.batch_norm(input, self.running_mean, self.running_var, *_widened(self), self.training, momentum, self.eps)


class FrozenBatchNorm(LocalBatchNorm):
    """Normalises by its running statistics, in training too, and never changes them; weight and bias still train.

    `train()` has no effect on it, so that no caller can thaw it by accident.
    """

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in evaluation mode, whatever `mode` says."""
        return super().train(False)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, …] → the same shape."""
        self._check_input_dim(input)
        return F.batch_norm(input, self.running_mean, self.running_var, *_widened(self), False, 0.0, self.eps)


class SyncBatchNorm(LocalBatchNorm):
    """BatchNorm over the batches of all ranks: N ranks compute, forward and backward, what one rank would on all of it.

    Works on any device and backend, for [N, C] to [N, C, D, H, W], and for ranks of unequal or even empty batches.
    Statistics are float64 on the wire and joined by their counts, so that large means cost no precision.
    The input's gradient is of the **sum** of the ranks' losses; weight and bias get this rank's share of it, which
    the engine averages over ranks like every other parameter's. Without a process group, plain BatchNorm.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, …] → the same shape. ValueError in training where all ranks together have one value per channel."""
        self._check_input_dim(input)
        if not self.training or not _several_ranks():
            return super().forward(input)
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        self._track(mean, variance, count)
        return cast(Tensor, output)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        unbiased = variance * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var), momentum)


class _Normalise(torch.autograd.Function):
    """Forward: one all-gather of (count, mean, Σ(x−mean)²). Backward: one all-reduce of (Σ dy, Σ dy·x̂)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _global_moments(x)
        exact = _statistics_type(x)
        invstd = (variance + eps).rsqrt().to(exact)
        centre = mean.to(exact)
        y = (x.to(exact) - _wide(centre, x)) * _wide(invstd, x)
        if weight is not None and bias is not None:
            y = y * _wide(weight.to(exact), x) + _wide(bias.to(exact), x)
        ctx.save_for_backward(x, weight, centre, invstd, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, mean, invstd, count = ctx.saved_tensors
        exact = mean.dtype
        dy = grad.to(exact)
        normal = (x.to(exact) - _wide(mean, x)) * _wide(invstd, x)
        axes = _axes(x)
        own = torch.stack((dy.sum(axes), (dy * normal).sum(axes)))  # [2, C], of this rank
        total = own.to(torch.float64, copy=True)  # a copy in float64 too: all_reduce writes into it
        dist.all_reduce(total)
        share = (total / count).to(exact)
        dx = (dy - _wide(share[0], x) - normal * _wide(share[1], x)) * _wide(invstd, x)
        if weight is None:
            return dx.to(x.dtype), None, None, None
        dx = dx * _wide(weight.to(exact), x)
        return dx.to(x.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], population variance [C] and count [] per channel over all ranks, float64."""
    channels = x.shape[1]
    own = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if x.numel():
        variance, mean = torch.var_mean(x.to(_statistics_type(x)), _axes(x), correction=0)
        count = x.numel() // channels
        own[0], own[1 : channels + 1], own[channels + 1 :] = count, mean.double(), variance.double() * count
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    every = torch.stack(gathered)  # [ranks, 1 + 2C]
    counts, means, squares = every[:, :1], every[:, 1 : channels + 1], every[:, channels + 1 :]
    total = counts.sum()
    if total <= 1:
        raise ValueError(f"BatchNorm needs more than one value per channel over all ranks in training, not {int(total)}")
    mean = (counts * means).sum(0) / total
    return mean, (squares + counts * (means - mean).square()).sum(0) / total, total


def _statistics_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _wide(value: Tensor, x: Tensor) -> Tensor:
    return value.view(1, -1, *([1] * (x.ndim - 2)))


def _check_dimensions(x: Tensor) -> None:
    if x.ndim < 2:
        raise ValueError(f"BatchNorm takes [N, C, …], not {[*x.shape]}")


def _widened(norm: _BatchNorm) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias in the type of the running statistics."""
    if norm.running_mean is None or norm.weight is None or norm.bias is None:
        return norm.weight, norm.bias
    return norm.weight.to(norm.running_mean), norm.bias.to(norm.running_mean)


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def prepare(model: nn.Module, mode: Literal["frozen", "local", "sync"]) -> nn.Module:
    """Put every BatchNorm of a model into a mode, in place; returns the model.

    frozen: running statistics fixed, as pretrained; weight and bias train. local: each rank normalises by its own
    batch; call `average_buffers` before every evaluation and save. sync: over the batches of all ranks.
    """
    kind = {"frozen": FrozenBatchNorm, "local": LocalBatchNorm, "sync": SyncBatchNorm}[mode]
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and type(child) is not kind:
                setattr(parent, name, _converted(child, kind))
    return model


def _converted(old: _BatchNorm, kind: type[_BatchNorm]) -> _BatchNorm:
    # on "meta" nothing is allocated: every parameter and buffer is the old one, so optimisers and tied names keep theirs
    new = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, device="meta")
    new.weight, new.bias = old.weight, old.bias
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(new, name, getattr(old, name))
    new.train(old.training)
    return new


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give every rank the mean over ranks of all running means and variances, and the largest batch counter.

    Collective: every rank calls it. Bit-equal on all ranks afterwards; nothing happens without several ranks.
    """
    if not _several_ranks():
        return
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.rsplit(".", 1)[-1] in _STATISTICS]
    floats = [buffer for _, buffer in buffers if buffer.is_floating_point()]
    counters = [buffer for _, buffer in buffers if not buffer.is_floating_point()]
    if floats:
        flat = torch.cat([buffer.reshape(-1).double() for buffer in floats])
        dist.all_reduce(flat)
        _scatter(flat / dist.get_world_size(), floats)
    if counters:
        flat = torch.stack(counters)
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
        _scatter(flat, counters)


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _scatter(flat: Tensor, buffers: list[Tensor]) -> None:
    for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))
