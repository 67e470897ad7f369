"""Attention as the paper prints it, Y = σ(K Qᵀ) V (equation 2), and as everyone else uses it.

One module serves both. "Rows" are the positions of the output, "columns" the positions summed over:

    weights = score(rows · columnsᵀ · scale + bias),   output = weights · V

`rows: key` makes the keys the rows and the queries the columns, as in equation 2; `rows: query` is the usual order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from jmt_dist.config import JmtOptions

WIDTH = 512  # of every feature vector (paper, section 4.2)
LENGTH = 8  # clips of a subsequence: rows of a learned positional table

LOW, HIGH = 0.05, 0.95  # a weight outside is saturated: a sigmoid's slope there is less than a fifth of its largest


@dataclass(frozen=True)
class AttentionStyle:
    """How scores become weights; the fields are those of `config.JmtOptions`. The defaults are the usual attention."""

    score: Literal["sigmoid", "softmax"] = "softmax"
    rows: Literal["key", "query"] = "query"
    scale: Literal["none", "sqrt"] = "sqrt"
    bias: Literal["none", "log_length"] = "none"

    @classmethod
    def of(cls, options: JmtOptions) -> AttentionStyle:
        """The style that a recipe's JMT asks for."""
        return cls(options.score, options.rows, options.scale, options.bias)


class Attention(nn.Module):
    """A(x ← s): queries from x, keys and values from s.

    Q, K and V are matrices (paper, section 3), followed by an output projection, which the paper leaves open. Only
    the row side has a bias: in a softmax, one of the column side cancels and one of V is absorbed by the output's,
    so with `AttentionStyle()` this computes the same class of functions as `torch.nn.MultiheadAttention`.
    """

    def __init__(self, style: AttentionStyle, width: int = WIDTH, heads: int = 1) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.style, self.heads = style, heads
        self.query = nn.Linear(width, width, bias=style.rows == "query")
        self.key = nn.Linear(width, width, bias=style.rows == "key")
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.observer: Callable[[Tensor, Tensor | None], None] | None = None
        for layer in (self.query, self.key, self.value, self.out):
            initialise(layer)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from x [B, L, width] to source [B, S, width]; mask [B, S] bool, True = valid, acts on the summed axis.

        Returns [B, L, width], or [B, S, width] where rows are keys, which needs L = S (ValueError otherwise): the
        summed axis is then that of the queries and of V at once. A sample without a valid position gets the output
        projection's bias.
        """
        if self.style.rows == "key" and x.shape[1] != source.shape[1]:
            raise ValueError(
                f"rows=key sums over queries and values together and needs equal lengths, not {x.shape[1]} and "
                f"{source.shape[1]}; use rows=query"
            )
        query, key, value = self._split(self.query(x)), self._split(self.key(source)), self._split(self.value(source))
        rows, columns = (key, query) if self.style.rows == "key" else (query, key)
        weights = self._weights(rows @ columns.transpose(-1, -2), mask)
        if self.observer is not None:
            self.observer(weights.detach(), mask)
        return cast(Tensor, self.out((weights @ value).transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, width / heads]

    def _weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if self.style.scale == "sqrt":
            scores = scores / math.sqrt(self.query.out_features // self.heads)
        if self.style.bias == "log_length":
            if mask is None:
                scores = scores - math.log(scores.shape[-1])
            else:
                scores = scores - mask.sum(-1).clamp(min=1).to(scores.dtype).log()[:, None, None, None]
        if self.style.score == "sigmoid":
            weights = scores.sigmoid()
        else:
            if mask is not None:
                # finite, not -inf: a row without a valid column must become 0 below and not NaN
                scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1)
        return weights if mask is None else weights.masked_fill(~mask[:, None, None, :], 0)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual and a layer norm behind it (post-norm)."""

    def __init__(self, style: AttentionStyle, *, width: int = WIDTH, heads: int = 1, feedforward: int = 512, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(style, width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)
        initialise(self.inner)
        initialise(self.outer)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, width], mask [B, L] or None → [B, L, width]."""
        x = self.norm1(x + self.dropout(self.attention(x, x, mask)))
        hidden = self.dropout(self.inner(x).relu())
        return cast(Tensor, self.norm2(x + self.dropout(self.outer(hidden))))


class Positions(nn.Module):
    """Positional encoding, added: none, a learned table of 8 positions, or sinusoids (Vaswani et al., 2017)."""

    def __init__(self, kind: Literal["none", "learned", "sinusoidal"], width: int = WIDTH) -> None:
        super().__init__()
        self.kind = kind
        if kind == "learned":
            self.table = nn.Parameter(torch.randn(LENGTH, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] → [B, L, width]. ValueError where L is longer than a learned table."""
        length, width = x.shape[1:]
        if self.kind == "learned":
            if length > LENGTH:
                raise ValueError(f"learned positions end at {LENGTH}, not at {length}; use positional=sinusoidal")
            return x + self.table[:length]
        if self.kind == "sinusoidal":
            return x + sinusoids(length, width).to(x)
        return x


def sinusoids(length: int, width: int) -> Tensor:
    """[length, width]: sin(t/10000^(2i/width)) at 2i, cos of it at 2i+1 (Vaswani et al., 2017, section 3.5)."""
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


class Encoder(nn.Module):
    """Positional encoding, then `layers` encoder layers."""

    def __init__(
        self,
        style: AttentionStyle,
        *,
        width: int = WIDTH,
        layers: int = 1,
        heads: int = 1,
        feedforward: int = 512,
        dropout: float = 0.0,
        positional: Literal["none", "learned", "sinusoidal"] = "none",
    ) -> None:
        super().__init__()
        self.positions = Positions(positional, width)
        self.layers = nn.ModuleList(
            EncoderLayer(style, width=width, heads=heads, feedforward=feedforward, dropout=dropout) for _ in range(layers)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, width], mask [B, L] or None → [B, L, width]."""
        x = self.positions(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def initialise(layer: nn.Linear) -> None:
    """Xavier weights and zero bias: keeps the variance of what flows through, which plain SGD relies on."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


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
    """Count attention weights below 0.05 or above 0.95 in every `Attention` of a model while the block runs.

    Masked columns and, where x and s have one length and so one mask, masked rows do not count.
    """
    result = Saturation()

    def observe(name: str) -> Callable[[Tensor, Tensor | None], None]:
        def observer(weights: Tensor, mask: Tensor | None) -> None:
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

    modules = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    before = {name: module.observer for name, module in modules.items()}
    for name, module in modules.items():
        module.observer = observe(name)
    try:
        yield result
    finally:
        for name, module in modules.items():
            module.observer = before[name]
