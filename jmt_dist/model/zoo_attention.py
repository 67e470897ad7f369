"""Fusion by other attentions: joint cross-attention and leader-follower attention."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from jmt_dist.model.attention import LENGTH, WIDTH, Observer
from jmt_dist.model.fusion import FusionModel
from jmt_dist.model.heads import FusionHead, linear
from jmt_dist.model.zoo_temporal import TemporalNetwork

INNER = 32  # k, the rows of an attention map (Praveen et al., 2022)
ENCODED = 128  # width of LFAN's streams


class CorrelationAttention(nn.Module):
    """One modality X [L, 512] against the joint J [L, 1024] (Praveen et al., 2022, equations 2 to 7).

    C = tanh(Xᵀ W J / √d) [512, 1024] with W [L, L] and d = 1024; H = ReLU(W_x X + W_c Cᵀ) [k, 512] with W_x [k, L]
    and W_c [k, 1024]; X_att = W_hᵀ H + X with W_h [k, L]. No biases, so clips that are 0 add nothing to C and H.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.Parameter(torch.empty(LENGTH, LENGTH))
        self.own = nn.Parameter(torch.empty(INNER, LENGTH))
        self.correlation = nn.Parameter(torch.empty(INNER, 2 * WIDTH))
        self.back = nn.Parameter(torch.empty(INNER, LENGTH))
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, joint: Tensor) -> Tensor:
        """X [B, L, 512], J [B, L, 1024] → X_att [B, L, 512]."""
        correlation = (x.transpose(1, 2) @ self.joint @ joint / math.sqrt(2 * WIDTH)).tanh()
        hidden = (self.own @ x + self.correlation @ correlation.transpose(1, 2)).relu()
        return self.back.T @ hidden + x


class JointCrossAttention(FusionModel):
    """Joint cross-attention, JCA: y = head([Xa_att; Xv_att]), J = [Fa; Fv].

    Source: Praveen et al., 2022 (the paper's [20] and its closest relative). Its weights mix the clips of a sequence
    by position, so the length is fixed at 8. Its regressor is given only as "fully connected layers": the common head.
    """

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = CorrelationAttention(), CorrelationAttention()
        self.head = FusionHead(2 * WIDTH)

    def fuse(self, audio: Tensor, visual: Tensor, mask: Tensor | None) -> Tensor:
        """[B, 8, 512] × 2 → [B, 8, 2]; ValueError for another length."""
        if audio.shape[1] != LENGTH:
            raise ValueError(f"jca has weights per position and needs {LENGTH} clips, not {audio.shape[1]}")
        joint = torch.cat((audio, visual), -1)
        return cast(Tensor, self.head(torch.cat((self.audio(audio, joint), self.visual(visual, joint)), -1)))


class LeaderFollower(FusionModel):
    """Leader-follower attentive fusion, LFAN: the visual stream leads, attention over the modalities follows.

    Source: Zhang et al., 2021. A TCN per modality; from each, a query, key and value; per clip, over the two
    modalities, F = softmax(Q Kᵀ / √d) V [2, d]; y = head([visual; F]), F flattened: the leader's own features are
    kept beside what attention makes of both. The source has several aural TCNs (one per descriptor), here one; widths
    (128) and the scale are open. Attention is within a clip, so masks concern the TCNs alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = TemporalNetwork(WIDTH, ENCODED), TemporalNetwork(WIDTH, ENCODED)
        # of each modality its own query, key and value; a bias of the key would cancel in the softmax
        self.query, self.value = (nn.ModuleList(linear(ENCODED, ENCODED) for _ in range(2)) for _ in range(2))
        self.key = nn.ModuleList(nn.Linear(ENCODED, ENCODED, bias=False) for _ in range(2))
        for layer in self.key:
            nn.init.xavier_uniform_(cast(Tensor, layer.weight))
        self.head = FusionHead(3 * ENCODED)
        self.observer: Observer | None = None

    def fuse(self, audio: Tensor, visual: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, 512] × 2 → [B, L, 2]."""
        streams = (self.visual(visual, mask), self.audio(audio, mask))
        query, key, value = (
            torch.stack([layer(stream) for layer, stream in zip(layers, streams, strict=True)], 2)
            for layers in (self.query, self.key, self.value)
        )  # [B, L, 2, d]
        weights = (query @ key.transpose(-1, -2) / math.sqrt(ENCODED)).softmax(-1)
        if self.observer is not None:
            valid = weights.detach().flatten(0, 1) if mask is None else weights.detach()[mask]
            self.observer(valid[:, None], None, "")  # [clips, heads, 2, 2]: a clip attends by itself
        attended = weights @ value
        return cast(Tensor, self.head(torch.cat((streams[0], attended.flatten(2)), -1)))
