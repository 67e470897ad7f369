"""Temporal convolutions, and the fusion by them and a transformer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jmt_dist.model.attention import WIDTH, AttentionStyle, Encoder, initialise
from jmt_dist.model.fusion import FusionModel
from jmt_dist.model.heads import FusionHead, linear

KERNEL = 3
DILATIONS = (1, 2)  # reach back 2·2·(1 + 2) = 12 clips; a dilation of 4 would have taps that only ever see padding at L = 8


class CausalConvolution(nn.Module):
    """A dilated convolution that sees this clip and those before it, then a layer norm and a ReLU."""

    def __init__(self, width: int, out: int, dilation: int) -> None:
        super().__init__()
        self.reach = (KERNEL - 1) * dilation
        self.convolution = nn.Conv1d(width, out, KERNEL, dilation=dilation)
        self.norm = nn.LayerNorm(out)
        nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="relu")
        nn.init.zeros_(cast(Tensor, self.convolution.bias))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, width] → [B, L, out], 0 at masked clips."""
        y = self.norm(self.convolution(F.pad(x.transpose(1, 2), (self.reach, 0))).transpose(1, 2)).relu()
        return y if mask is None else y.masked_fill(~mask[..., None], 0)


class TemporalNetwork(nn.Module):
    """A temporal convolutional network (Bai et al., 2018): residual blocks of two dilated causal convolutions.

    With a layer norm where the source has weight normalisation: it needs no reparametrised weights, which ZeRO and
    ONNX export dislike. Masked clips are 0 behind every convolution, as the padding before the first clip is.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        widths = (width, *(out for _ in DILATIONS))
        self.first = nn.ModuleList(CausalConvolution(w, out, d) for w, d in zip(widths[:-1], DILATIONS, strict=True))
        self.second = nn.ModuleList(CausalConvolution(out, out, d) for d in DILATIONS)
        self.shortcut = nn.Linear(width, out, bias=False)
        initialise(self.shortcut)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, width], 0 at masked clips, → [B, L, out]."""
        for index, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            x = ((self.shortcut(x) if index == 0 else x) + second(first(x, mask), mask)).relu()
        return x


class TemporalConvolution(FusionModel):
    """A TCN per modality, the outputs concatenated, a transformer encoder, the head: y = head(encoder(FC([TCNa; TCNv]))).

    Source: Zhou et al., 2023 (the paper's [27]). Their TCNs are wider and deeper for windows of 300 frames; these
    cover the 8 clips. FC 512 → 512 in front of the encoder is theirs in kind, its width is open.
    """

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = TemporalNetwork(WIDTH, 256), TemporalNetwork(WIDTH, 256)
        self.reduce = linear(512, WIDTH)
        self.encoder = Encoder(AttentionStyle(), heads=4)
        self.head = FusionHead(WIDTH)

    def fuse(self, audio: Tensor, visual: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, 512] × 2 → [B, L, 2]."""
        both = torch.cat((self.audio(audio, mask), self.visual(visual, mask)), -1)
        return cast(Tensor, self.head(self.encoder(self.reduce(both), mask)))
