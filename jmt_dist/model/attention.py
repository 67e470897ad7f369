"""Attention as the paper prints it, Y = σ(K Qᵀ) V (equation 2), and as everyone else uses it.

One module serves both. "Rows" are the positions of the output, "columns" the positions summed over:

    weights = score(rows · columnsᵀ · scale + bias),   output = weights · V

`rows: key` makes the keys the rows and the queries the columns, as in equation 2; `rows: query` is the usual order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jmt_dist.config import JmtOptions

WIDTH = 512  # of every feature vector (paper, section 4.2)
LENGTH = 8  # clips of a subsequence: rows of a learned positional table


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


Observer = Callable[[Tensor, Tensor | None, str], None]  # weights [N, heads, rows, columns], mask, name of the attention


def attend(
    style: AttentionStyle,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    heads: int = 1,
    observe: Callable[[Tensor, Tensor | None], None] | None = None,
) -> Tensor:
    """Weights · V for projected query [N, L, d], key [N, S, d], value [N, S, d], mask [N, S] (True = valid) or None.

    Returns [N, L, d], or [N, S, d] where rows are keys, which needs L = S (ValueError otherwise): the summed axis is then
    that of the queries and of V at once. A sample without a valid position gets 0. A softmax runs as torch's
    scaled_dot_product_attention, which never holds the weights; they are computed apart where `observe` wants them.
    """
    if style.rows == "key" and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"rows=key sums over queries and values together and needs equal lengths, not {query.shape[1]} and "
            f"{key.shape[1]}; use rows=query"
        )
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))  # [N, heads, L, d / heads]
    rows, columns = (key, query) if style.rows == "key" else (query, key)
    if style.score == "softmax":
        if observe is not None:
            observe(attention_weights(style, rows, columns, mask).detach(), mask)
        result = _softmax_attention(style, rows, columns, value, mask)
    else:
        weights = attention_weights(style, rows, columns, mask)
        if observe is not None:
            observe(weights.detach(), mask)
        result = weights @ value
    return result.transpose(1, 2).flatten(2)


def _softmax_attention(style: AttentionStyle, rows: Tensor, columns: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    # the bias by length is the same for all of a row and cancels
    scale = None if style.scale == "sqrt" else 1.0  # None: torch's 1 / √d
    if mask is None:
        return F.scaled_dot_product_attention(rows, columns, value, scale=scale)
    some = mask.any(-1, keepdim=True)
    # where nothing is valid, all is allowed and the result then dropped: a softmax over nothing is NaN
    result = F.scaled_dot_product_attention(rows, columns, value, (mask | ~some)[:, None, None, :], scale=scale)
    return result.masked_fill(~some[:, None, None], 0)


def attention_weights(
    style: AttentionStyle, rows: Tensor, columns: Tensor, mask: Tensor | None = None, *, width: int | None = None
) -> Tensor:
    """rows [N, heads, L, d], columns [N, heads, S, d], mask [N, S] or None → weights [N, heads, L, S], 0 at masked columns.

    `width`: what the scores are scaled by the root of; by default d.
    """
    scores = rows @ columns.transpose(-1, -2)
    if style.scale == "sqrt":
        scores = scores / math.sqrt(width or rows.shape[-1])
    if style.bias == "log_length":
        if mask is None:
            scores = scores - math.log(scores.shape[-1])
        else:
            scores = scores - mask.sum(-1).clamp(min=1).to(scores.dtype).log()[:, None, None, None]
    if style.score == "sigmoid":
        weights = scores.sigmoid()
    else:
        if mask is not None:
            # finite, not -inf: a row without a valid column must become 0 below and not NaN
            scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
    return weights if mask is None else weights.masked_fill(~mask[:, None, None, :], 0)


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
        self.observer: Observer | None = None
        for layer in (self.query, self.key, self.value, self.out):
            initialise(layer)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from x [B, L, width] to source [B, S, width]; mask [B, S] bool, True = valid, acts on the summed axis.

        Returns [B, L, width], or [B, S, width] where rows are keys (see `attend`). A sample without a valid position
        gets the output projection's bias.
        """
        watcher = self.observer
        observe = None if watcher is None else lambda weights, mask: watcher(weights, mask, "")
        query, key, value = self.query(x), self.key(source), self.value(source)
        return cast(Tensor, self.out(attend(self.style, query, key, value, mask, heads=self.heads, observe=observe)))

    def last(self, x: Tensor) -> Tensor:
        """What `forward(x, x)` gives at the last position: [B, S, width] → [B, width], at a sixth of its operations for S = 6.

        Only that position's row is projected. The column side's matrix is applied to it instead of to every position, since
        r · (C x) = (Cᵀ r) · x, and V's to the weighted sum of positions, since it is linear.
        """
        row, column = (self.key, self.query) if self.style.rows == "key" else (self.query, self.key)
        rows = row(x[:, -1]).unflatten(-1, (self.heads, -1)).transpose(0, 1)  # [heads, B, d]
        through = (rows @ column.weight.unflatten(0, (self.heads, -1))).transpose(0, 1)  # [B, heads, width]
        weights = attention_weights(self.style, through[:, None], x[:, None], width=rows.shape[-1])[:, 0]  # [B, heads, S]
        if self.observer is not None:
            self.observer(weights.detach()[:, :, None], None, "")
        mixed = (weights @ x).transpose(0, 1) @ self.value.weight.unflatten(0, (self.heads, -1)).transpose(1, 2)  # [heads, B, d]
        return cast(Tensor, self.out(mixed.transpose(0, 1).flatten(1)))


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
