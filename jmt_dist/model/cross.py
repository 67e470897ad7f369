"""The cross-attentions of the Joint Multimodal Transformer, all of them in a few large operations.

Six small attentions, one after the other, would be 24 small matrix products. Here every stream is projected once, by one
matrix that holds all that is asked of it (2 queries, 2 keys, 2 values of 512), and scores, weights and output projections
of all pairs are one batched operation each: measured in `benchmarks/bench_fusion.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jmt_dist.model.attention import WIDTH, Attention, AttentionStyle, Observer, attend

Pair = tuple[str, str]  # (x, s) of A(x ← s)
ROLES = ("query", "key", "value")


class Projections(nn.Module):
    """Several [width, width] matrices with one input, as one; the first `biased` of them have a bias."""

    def __init__(self, count: int, biased: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(count * width, width))
        self.bias = nn.Parameter(torch.zeros(biased * width))
        for block in self.weight.detach().split(width):
            nn.init.xavier_uniform_(block)  # each is a matrix of its own: Xavier by 512 + 512, not by what they are stored in

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, L, width] → one [B, L, width] for each matrix."""
        bias = F.pad(self.bias, (0, len(self.weight) - len(self.bias)))
        return F.linear(x, self.weight, bias).unflatten(-1, (-1, self.width)).unbind(-2)

    def matrices(self) -> list[tuple[Tensor, Tensor | None]]:
        """(weight, bias or None) of each matrix."""
        biases = self.bias.split(self.width)
        return [(w, biases[i] if i < len(biases) else None) for i, w in enumerate(self.weight.split(self.width))]


class CrossAttentions(nn.Module):
    """A(x ← s) of several ordered pairs (x, s) of streams, each as `Attention` computes it (paper, section 3).

    `shared` (the authors' public code): one attention for each x, used for all its sources; pairs of one x must follow one
    another. Otherwise each pair has matrices of its own.
    """

    def __init__(self, style: AttentionStyle, pairs: Sequence[Pair], *, shared: bool = False, width: int = WIDTH, heads: int = 1) -> None:
        super().__init__()
        self.style, self.pairs, self.shared, self.heads = style, tuple(pairs), shared, heads
        self.observer: Observer | None = None
        targets = list(dict.fromkeys(x for x, _ in pairs))
        if shared and [x for x, _ in pairs] != sorted((x for x, _ in pairs), key=targets.index):
            raise ValueError("shared cross-attentions need the pairs of one x next to one another")
        # rows first: they alone have biases (see Attention)
        self._roles = ("key", "query", "value") if style.rows == "key" else ROLES
        streams = sorted({name for pair in pairs for name in pair})
        self._asked = {} if shared else {name: self._asked_of(name) for name in streams}  # what each stream's projections are
        if shared:
            self.project = nn.ModuleDict({name: Projections(3, 1, width) for name in targets})
        else:
            biased = {name: sum(role == self._roles[0] for role, _ in self._asked[name]) for name in streams}
            self.project = nn.ModuleDict({name: Projections(len(self._asked[name]), biased[name], width) for name in streams})
        count = len(targets) if shared else len(pairs)
        self.out_weight = nn.Parameter(torch.empty(count, width, width))
        self.out_bias = nn.Parameter(torch.zeros(count, 1, width))
        for block in self.out_weight.detach():
            nn.init.xavier_uniform_(block)

    def _asked_of(self, stream: str) -> list[tuple[str, Pair]]:
        """(role, pair) of each projection of a stream: queries of the pairs it attends in, keys and values where it is the source."""
        return [(role, pair) for role in self._roles for pair in self.pairs if pair[0 if role == "query" else 1] == stream]

    def forward(self, streams: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """Streams {name: [B, L, width]}, mask [B, L] bool (True = valid) or None → [pairs, B, L, width]."""
        query, key, value = self._project_shared(streams) if self.shared else self._project(streams)  # [P, B, L, width]
        batch, length, width = query.shape[1:]
        every = None if mask is None else mask.repeat(len(self.pairs), 1)
        observe = None if self.observer is None else self._observe
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        attended = attend(self.style, query, key, value, every, heads=self.heads, observe=observe)
        each = attended.reshape(len(self.out_weight), -1, width)
        return torch.baddbmm(self.out_bias, each, self.out_weight.transpose(1, 2)).reshape(-1, batch, length, width)

    def _project(self, streams: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        parts = {
            asked: found
            for name, all_asked in self._asked.items()
            for asked, found in zip(all_asked, self.project[name](streams[name]), strict=True)
        }
        return tuple(torch.stack([parts[role, pair] for pair in self.pairs]) for role in ROLES)

    def _project_shared(self, streams: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        query, key, value = [], [], []
        for name in self.project:  # in the order of the pairs
            matrices = dict(zip(self._roles, self._projections(name).matrices(), strict=True))
            sources = torch.stack([streams[s] for x, s in self.pairs if x == name])
            query += [F.linear(streams[name], *matrices["query"])] * len(sources)
            key.append(F.linear(sources, *matrices["key"]))
            value.append(F.linear(sources, *matrices["value"]))
        return torch.stack(query), torch.cat(key), torch.cat(value)

    def _observe(self, weights: Tensor, mask: Tensor | None) -> None:
        masks: Sequence[Tensor | None] = [None] * len(self.pairs) if mask is None else mask.chunk(len(self.pairs))
        for (x, s), one, its in zip(self.pairs, weights.chunk(len(self.pairs)), masks, strict=True):
            assert self.observer is not None
            self.observer(one, its, f"{x}_from_{s}")

    def single(self, x: str, s: str) -> Attention:
        """One pair as an `Attention` of its own, with a copy of its parameters."""
        width = self.out_weight.shape[-1]
        found = Attention(self.style, width, self.heads).to(self.out_weight)
        state = {}
        for role in ROLES:
            if self.shared:
                weight, bias = self._projections(x).matrices()[self._roles.index(role)]
            else:
                stream = x if role == "query" else s
                weight, bias = self._projections(stream).matrices()[self._asked[stream].index((role, (x, s)))]
            state[f"{role}.weight"] = weight
            state |= {} if bias is None else {f"{role}.bias": bias}
        place = list(self.project).index(x) if self.shared else self.pairs.index((x, s))
        found.load_state_dict({**state, "out.weight": self.out_weight[place], "out.bias": self.out_bias[place, 0]})
        return found

    def _projections(self, name: str) -> Projections:
        found = self.project[name]
        assert isinstance(found, Projections)
        return found
