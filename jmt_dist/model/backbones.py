"""The backbones, from torchvision: R(2+1)D or ResNet-50 for face clips, ResNet-18 and a GRU for spectrograms.

They are built with random weights; `weights.load_initial` loads pretrained ones. The modules inside `net` keep
torchvision's names, so that its files fit.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.video import r2plus1d_18
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

from jmt_dist.config import AudioOptions, VisualOptions
from jmt_dist.model.attention import WIDTH, initialise
from jmt_dist.model.registry import audio_backbone, visual_backbone


@visual_backbone("r2plus1d")
class VisualBackbone(nn.Module):
    """R(2+1)D of 18 or 10 layers (paper, section 3; Tran et al., 2018); depth 10 has one block per layer."""

    def __init__(self, options: VisualOptions) -> None:
        super().__init__()
        if options.depth == 18:
            self.net = r2plus1d_18(weights=None)
        else:
            self.net = VideoResNet(BasicBlock, [Conv2Plus1D] * 4, [1, 1, 1, 1], R2Plus1dStem)
        if options.pooling == "max":
            self.net.avgpool = nn.AdaptiveMaxPool3d(1)
        self.net.fc = nn.Identity()

    def forward(self, frames: Tensor) -> Tensor:
        """Clips [N, 3, 8, H, W], normalised as for Kinetics → features [N, 512]."""
        return cast(Tensor, self.net(frames))


@visual_backbone("resnet50")
class FrameBackbone(nn.Module):
    """ResNet-50 on each frame (He et al., 2016), pooled over the 8 frames of a clip, FC 2048 → 512: no motion is seen.

    The challenge's baseline is a ResNet-50 on single frames; pooling over the clip and the FC are what it takes to stand in the
    place of R(2+1)D, and are open. Frames come normalised by Kinetics' mean and deviation, as the loader gives them.
    """

    def __init__(self, options: VisualOptions) -> None:
        super().__init__()
        self.net = resnet50(weights=None)
        self.net.fc = nn.Identity()
        self.pooling = options.pooling
        self.reduce = nn.Linear(2048, WIDTH)
        initialise(self.reduce)

    def forward(self, frames: Tensor) -> Tensor:
        """Clips [N, 3, 8, H, W] → features [N, 512]."""
        each = self.net(frames.transpose(1, 2).flatten(0, 1)).unflatten(0, (frames.shape[0], frames.shape[2]))
        pooled = each.amax(1) if self.pooling == "max" else each.mean(1)
        return cast(Tensor, self.reduce(pooled))


@audio_backbone("resnet18")
class AudioBackbone(nn.Module):
    """ResNet-18 with a one-channel first convolution, then a GRU over the clips of a subsequence (paper, sections 3, 4.2).

    The paper leaves the GRU's shape open: one layer of 512 that runs forward in time. `gru: false` leaves it out.
    """

    def __init__(self, options: AudioOptions) -> None:
        super().__init__()
        self.net = resnet18(weights=None)
        self.net.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
        self.net.fc = nn.Identity()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True) if options.gru else None

    def forward(self, mel: Tensor) -> Tensor:
        """Spectrograms [B, C, 64, T], normalised log power, of C consecutive clips → features [B, C, 512]."""
        features = self.net(mel.flatten(0, 1).unsqueeze(1)).unflatten(0, mel.shape[:2])
        return cast(Tensor, features if self.gru is None else self.gru(features)[0])
