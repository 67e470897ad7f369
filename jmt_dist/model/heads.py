"""What turns features into valence and arousal, and the two unimodal models made of a backbone and a head."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from jmt_dist.config import AudioOptions, VisualOptions
from jmt_dist.model import backbones  # noqa: F401 registers the backbones of this package
from jmt_dist.model.attention import WIDTH, initialise
from jmt_dist.model.registry import checked, make_audio, make_visual

HIDDEN = 128  # of the last hidden layer (paper, section 4.2)
JOINT = 1024  # of the fully connected layer behind the concatenated outputs (paper, section 4.2)


def linear(width: int, out: int) -> nn.Linear:
    """A linear layer with Xavier weights and zero bias."""
    layer = nn.Linear(width, out)
    initialise(layer)
    return layer


class Regressor(nn.Module):
    """Head of a backbone in its own stage: dropout, FC 512 → 128, ReLU, dropout, FC 128 → 2.

    The paper says no more than "a dropout with a value of 0.8 was used in the linear layers" (section 4.2); the
    hidden width is that of its fusion head. Outputs are not bounded; predictions are clipped at evaluation.
    """

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout(dropout), linear(width, HIDDEN), nn.ReLU(), nn.Dropout(dropout), linear(HIDDEN, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Features [..., width] → (valence, arousal) [..., 2]."""
        return cast(Tensor, self.layers(x))


class TargetMlps(nn.Module):
    """One MLP per target: width → 128 → 1 (paper, section 4.2), ReLU between, which the paper leaves open."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.valence, self.arousal = (
            nn.Sequential(linear(width, HIDDEN), nn.ReLU(), nn.Dropout(dropout), linear(HIDDEN, 1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → (valence, arousal) [..., 2]."""
        return torch.cat((self.valence(x), self.arousal(x)), -1)


class FusionHead(nn.Module):
    """Concatenated outputs → FC 1024 → per target FC 128 → 1 (paper, section 4.2); the head of every system in the zoo."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.joint = nn.Sequential(linear(width, JOINT), nn.ReLU(), nn.Dropout(dropout))
        self.targets = TargetMlps(JOINT, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → (valence, arousal) [..., 2]."""
        return cast(Tensor, self.targets(self.joint(x)))


class VisualModel(nn.Module):
    """The visual stage: a backbone (`visual.backbone`) and a regressor."""

    def __init__(self, options: VisualOptions) -> None:
        super().__init__()
        self.backbone = make_visual(options)
        self.head = Regressor(dropout=options.dropout)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames [B, C, 3, 8, H, W] of C clips → features [B, C, 512], (valence, arousal) [B, C, 2]."""
        features = checked(self.backbone(frames.flatten(0, 1)), "visual").unflatten(0, frames.shape[:2])
        return features, self.head(features)


class AudioModel(nn.Module):
    """The audio stage: a backbone (`audio.backbone`) and a regressor."""

    def __init__(self, options: AudioOptions) -> None:
        super().__init__()
        self.backbone = make_audio(options)
        self.head = Regressor(dropout=options.dropout)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrograms [B, C, 64, T] of C clips → features [B, C, 512], (valence, arousal) [B, C, 2]."""
        features = checked(self.backbone(mel), "audio")
        return features, self.head(features)
