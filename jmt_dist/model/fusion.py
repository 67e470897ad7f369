"""The Joint Multimodal Transformer (paper, section 3, figure 1), and what every fusion model shares."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jmt_dist.config import JmtOptions
from jmt_dist.errors import UserError
from jmt_dist.model.attention import WIDTH, Attention, AttentionStyle, Encoder, EncoderLayer
from jmt_dist.model.cross import CrossAttentions
from jmt_dist.model.heads import FusionHead, TargetMlps, linear


class FusionModel(nn.Module):
    """Base of all fusion models: (audio, visual, mask) → (valence, arousal) per clip.

    What a sample or a valid clip gets never depends on other samples or on masked clips, whatever those hold: masked
    features are zeroed on entry, NaN included, and every subclass leaves masked clips out of what it sums over.
    Outputs at masked clips mean nothing.
    """

    def forward(self, audio: Tensor, visual: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features [B, L, 512] of each modality, mask [B, L] bool (True = valid) or None → [B, L, 2]."""
        if audio.shape != visual.shape or audio.ndim != 3 or audio.shape[-1] != WIDTH:
            raise ValueError(f"audio and visual features should both be [B, L, {WIDTH}], not {[*audio.shape]} and {[*visual.shape]}")
        audio, mask = prepare(self, audio, mask)
        visual, mask = prepare(self, visual, mask)
        return self.fuse(audio, visual, mask)

    def fuse(self, audio: Tensor, visual: Tensor, mask: Tensor | None) -> Tensor:
        """The model itself, on features of the parameters' type whose masked clips are 0."""
        raise NotImplementedError


def prepare(model: nn.Module, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Features in the type of the model's parameters (they are stored as float16), 0 at masked clips; the mask as bool."""
    features = features.to(next(model.parameters()).dtype)
    if mask is None:
        return features, None
    if mask.shape != features.shape[:2]:
        raise ValueError(f"the mask should be {[*features.shape[:2]]}, not {[*mask.shape]}")
    mask = mask.bool()
    return features.masked_fill(~mask[..., None], 0), mask


# (x, s) of each cross-attention A(x ← s). Audio attending to the joint stream comes last: the self-attention head
# reads the last token, and in the authors' public code that is this one.
PAIRS = (("visual", "audio"), ("visual", "joint"), ("joint", "visual"), ("joint", "audio"), ("audio", "visual"), ("audio", "joint"))


class JMT(FusionModel):
    """Joint Multimodal Transformer; every knob of `JmtOptions`, the defaults being the paper as printed.

    J = FC([Fa; Fv]) (equation 1); one encoder each for Fa, Fv, J; a cross-attention for each ordered pair of the
    three, without residual or norm; the six outputs concatenated (6 × 512 = 3072; the paper's 3074 is a slip) and
    regressed, or read by a self-attention head. `joint: false` keeps the two pairs of audio and visual.
    The paper leaves open: output projections, residuals, norms and feed-forward layers of the encoders (here post-norm,
    as in the authors' public code), activations of the head (here ReLU).
    """

    def __init__(self, options: JmtOptions | None = None) -> None:
        super().__init__()
        self.options = options = options or JmtOptions()
        if WIDTH % options.heads:
            raise UserError(f"fusion.jmt.heads={options.heads} does not divide the width of {WIDTH}", "Take 1, 2, 4, 8 or 16 heads.")
        style = AttentionStyle.of(options)
        streams = ("audio", "visual", "joint") if options.joint else ("audio", "visual")
        self.pairs = tuple(pair for pair in PAIRS if set(pair) <= set(streams))
        self.reduce = linear(2 * WIDTH, WIDTH) if options.joint else None
        self.encoders = nn.ModuleDict(
            {
                stream: Encoder(
                    style,
                    layers=options.layers,
                    heads=options.heads,
                    feedforward=options.feedforward,
                    dropout=options.dropout,
                    positional=options.positional,
                )
                for stream in streams
            }
        )
        self.cross = CrossAttentions(style, self.pairs, shared=options.cross == "shared", heads=options.heads)
        self.head: nn.Module
        if options.head == "concat":
            self.head = ConcatHead(len(self.pairs), options)
        else:
            self.head = SelfAttentionHead(style, options)

    def fuse(self, audio: Tensor, visual: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, 512] × 2 → [B, L, 2]."""
        if self.options.normalise:
            audio, visual = F.normalize(audio, dim=-1), F.normalize(visual, dim=-1)
        streams = {"audio": audio, "visual": visual}
        if self.reduce is not None:
            streams["joint"] = self.reduce(torch.cat((audio, visual), -1))
        encoded = {name: self.encoders[name](stream, mask) for name, stream in streams.items()}
        return cast(Tensor, self.head(self.cross(encoded, mask).permute(1, 2, 0, 3)))


class ConcatHead(nn.Module):
    """The outputs of the cross-attentions side by side → FC 1024 → per target FC 128 → 1 (paper, section 4.2)."""

    def __init__(self, count: int, options: JmtOptions) -> None:
        super().__init__()
        self.regress = FusionHead(count * WIDTH, options.dropout)

    def forward(self, outputs: Tensor) -> Tensor:
        """[B, L, count, 512] → [B, L, 2]."""
        return cast(Tensor, self.regress(outputs.flatten(2)))


class SelfAttentionHead(nn.Module):
    """Self-attention over the outputs of the cross-attentions (authors' public code).

    The outputs of one clip are tokens of an encoder layer and a self-attention, whose last token goes to an MLP per
    target, 512 → 128 → 1. Clips do not see one another here, so no mask is needed.
    """

    def __init__(self, style: AttentionStyle, options: JmtOptions) -> None:
        super().__init__()
        self.encoder = EncoderLayer(style, heads=options.heads, feedforward=options.feedforward, dropout=options.dropout)
        self.attention = Attention(style, heads=options.heads)
        self.targets = TargetMlps(WIDTH, options.dropout)

    def forward(self, outputs: Tensor) -> Tensor:
        """[B, L, count, 512] → [B, L, 2]."""
        last = self.attention.last(self.encoder(outputs.flatten(0, 1)))
        return cast(Tensor, self.targets(last).unflatten(0, outputs.shape[:2]))
