"""Fusion by recurrent networks."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from jmt_dist.model.attention import WIDTH, AttentionStyle, EncoderLayer
from jmt_dist.model.fusion import FusionModel
from jmt_dist.model.heads import FusionHead, linear


def run_recurrent(network: nn.LSTM, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run a forward LSTM over the valid clips only, in their order: x [B, L, d], mask [B, L] or None → [B, L, hidden].

    Valid clips are moved to the front; what follows them cannot reach back in a forward network.
    """
    if mask is None:
        return cast(Tensor, network(x)[0])
    order = torch.argsort((~mask).int(), dim=1, stable=True)
    front = network(x.gather(1, order[..., None].expand_as(x)))[0]
    back = torch.argsort(order, dim=1)
    return cast(Tensor, front.gather(1, back[..., None].expand_as(front)))


class RecurrentFusion(FusionModel):
    """Concatenated features into an LSTM: y = head(LSTM([Fa; Fv])).

    Source: Tzirakis et al., 2017 (the paper's [24]): a two-layer LSTM of 256 cells models time and fuses at once. It
    runs forward in time, as there; the source regresses from the LSTM with one linear layer, here the common head.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.LSTM(2 * WIDTH, 256, num_layers=2, batch_first=True)
        self.head = FusionHead(256)

    def fuse(self, audio: Tensor, visual: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, 512] × 2 → [B, L, 2]."""
        return cast(Tensor, self.head(run_recurrent(self.network, torch.cat((audio, visual), -1), mask)))


class SelfAttentionLstm(FusionModel):
    """Self-attention over the fused sequence, then an LSTM: y = head(LSTM(encoder(FC([Fa; Fv])))).

    Source: Huang et al., 2020 (the paper's [8]), who combine multi-head attention fusion in a transformer with an
    LSTM behind it; of their several heads and layer counts this takes one encoder layer of 4 heads and one LSTM layer
    of 256 cells. FC 1024 → 512 brings the concatenation to the width of the other systems.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reduce = linear(2 * WIDTH, WIDTH)
        self.encoder = EncoderLayer(AttentionStyle(), heads=4)
        self.network = nn.LSTM(WIDTH, 256, batch_first=True)
        self.head = FusionHead(256)

    def fuse(self, audio: Tensor, visual: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, 512] × 2 → [B, L, 2]."""
        attended = self.encoder(self.reduce(torch.cat((audio, visual), -1)), mask)
        return cast(Tensor, self.head(run_recurrent(self.network, attended, mask)))
