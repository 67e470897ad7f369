"""The systems that JMT is compared with, by name: same features, same signature, same regression head.

Each class says where it comes from, its equations, and what its source leaves open. Widths are adapted to the
512-d features and the 8 clips used here, and dropout is left out, as the paper's fusion has none: so they compare
ways of fusing, not complete published systems. All follow `FusionModel` on masks and batch neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from jmt_dist.config import FusionOptions, JmtOptions
from jmt_dist.model.attention import WIDTH, AttentionStyle, Encoder
from jmt_dist.model.fusion import JMT, FusionModel, prepare
from jmt_dist.model.heads import FusionHead, linear
from jmt_dist.model.zoo_attention import JointCrossAttention, LeaderFollower
from jmt_dist.model.zoo_recurrent import RecurrentFusion, SelfAttentionLstm
from jmt_dist.model.zoo_temporal import TemporalConvolution


class Unimodal(FusionModel):
    """One modality alone: y = head(encoder(F)), a transformer encoder (usual softmax attention) over its clips.

    The fair floor for every fusion: it gets the temporal context and the head that JMT gets, and nothing of the other
    modality, whose features are not read (they may be NaN). Source: none, since the paper has no such row; all is open.
    """

    def __init__(self, modality: Literal["audio", "visual"]) -> None:
        super().__init__()
        self.modality = modality
        self.encoder = Encoder(AttentionStyle())
        self.head = FusionHead(WIDTH)

    def forward(self, audio: Tensor, visual: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `FusionModel.forward`; only the features of this modality are read."""
        features, mask = prepare(self, audio if self.modality == "audio" else visual, mask)
        return cast(Tensor, self.head(self.encoder(features, mask)))


class Concatenation(FusionModel):
    """Feature concatenation: y = head(ReLU(FC([Fa; Fv]))), FC 1024 → 512, clip by clip.

    Source: the concatenation baseline of the paper's lineage, named in the abstract's "baseline" and spelt out nowhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reduce = linear(2 * WIDTH, WIDTH)
        self.head = FusionHead(WIDTH)

    def fuse(self, audio: Tensor, visual: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, 512] × 2 → [B, L, 2]."""
        return cast(Tensor, self.head(self.reduce(torch.cat((audio, visual), -1)).relu()))


class Gated(FusionModel):
    """Gated multimodal unit (Arevalo et al., 2017, equations 1 to 4), clip by clip.

    ha = tanh(Wa Fa), hv = tanh(Wv Fv), z = σ(Wz [Fa; Fv]), h = z · hv + (1 − z) · ha; then the regression head.
    The source classifies whole films, so it leaves the sequence open: clips do not see one another here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.gate = linear(2 * WIDTH, WIDTH)
        self.head = FusionHead(WIDTH)

    def fuse(self, audio: Tensor, visual: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, 512] × 2 → [B, L, 2]."""
        gate = self.gate(torch.cat((audio, visual), -1)).sigmoid()
        return cast(Tensor, self.head(gate * self.visual(visual).tanh() + (1 - gate) * self.audio(audio).tanh()))


class Vanilla(JMT):
    """The vanilla multimodal transformer: JMT without the joint stream and with the usual attention.

    Two encoders, A(v ← a) and A(a ← v) with softmax(Q Kᵀ / √d) V (as Tran et al., the paper's [22]), outputs
    concatenated, regression head. Depth, norms and feed-forward layers are open: JMT's own. The authors' public code
    runs this baseline's attention across the batch; here it runs across time.
    """

    def __init__(self) -> None:
        super().__init__(JmtOptions(score="softmax", rows="query", scale="sqrt", joint=False))


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "visual": lambda: Unimodal("visual"),
    "audio": lambda: Unimodal("audio"),
    "concat": Concatenation,
    "lstm": RecurrentFusion,
    "vanilla": Vanilla,
    "selfattn_lstm": SelfAttentionLstm,
    "jca": JointCrossAttention,
    "lfan": LeaderFollower,
    "tcn": TemporalConvolution,
    "gated": Gated,
}


def make_fusion(options: FusionOptions, model: str = "") -> nn.Module:
    """The fusion model that `fusion.model` names, or another name of the zoo (for `fusion.baselines`), freshly initialised.

    Forward: audio [B, L, 512], visual [B, L, 512], mask [B, L] or None → [B, L, 2].
    """
    name = model or options.model
    return JMT(options.jmt) if name == "jmt" else _MODELS[name]()
