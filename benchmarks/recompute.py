"""The fusion as the authors' public code trains it: the frozen backbones run again for every sample of every batch, from loose files."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from loader_data import Loose, log_mel, normalise
from loader_sides import _pixels, _wave
from PIL import Image
from torch import Tensor, nn

from jmt_dist.data.features import FeatureLoader, FeatureSet
from jmt_dist.data.pipeline import clips


class Recompute(FeatureLoader):
    """A `FeatureLoader` whose features are computed when they are asked for, sample by sample, from JPEGs and WAVs at offset 0."""

    def __init__(self, features: FeatureSet, loose: Sequence[Loose], visual: nn.Module, audio: nn.Module, size: int, batch: int) -> None:
        super().__init__(features, batch=batch, passes=1, seed=0)
        self._loose = {found.id[:3]: found for found in loose}
        self._visual, self._audio, self._size = visual.eval(), audio.eval(), size

    @torch.no_grad()
    def _batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        samples = rows[:, 0]
        ident = self.features.ident[samples]
        found = [self.sample(self._loose[tuple(row[:3].tolist())]) for row in ident]
        return {
            "visual": torch.cat([visual for visual, _ in found]),
            "audio": torch.cat([audio for _, audio in found]),
            "va": torch.from_numpy(self._va[samples, rows[:, 1]]),
            "id": torch.from_numpy(ident),
            "q": torch.zeros(len(rows), dtype=torch.int64),
        }

    @torch.no_grad()
    def sample(self, loose: Loose) -> tuple[Tensor, Tensor]:
        """Visual and audio features [1, 8, 512] of one subsequence."""
        frames = clips(read_frames(loose, self._size)[None])
        visual = self._visual(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return visual, self._audio(read_mel(loose)[None])


def read_frames(loose: Loose, size: int) -> Tensor:
    """The 64 crops of a subsequence by Pillow, each resized by itself: [64, size, size, 3]."""
    pictures = [Image.fromarray(_pixels(path)).resize((size, size), Image.Resampling.BILINEAR) for path in loose.crops]
    return normalise(torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])))


def read_mel(loose: Loose) -> Tensor:
    """The spectrograms of its clips, one after the other: [8, 64, 107]."""
    return torch.stack([log_mel(_wave(path)) for path in loose.wavs])


def seconds_of_parts(loose: Loose, visual: nn.Module, audio: nn.Module, size: int, tries: int) -> dict[str, float]:
    """Median seconds of reading, of the visual and of the audio backbone for one subsequence with frames of `size`."""
    found: dict[str, list[float]] = {"read": [], "visual": [], "audio": []}
    with torch.no_grad():
        for _ in range(tries):
            times = [time.perf_counter()]
            frames, mel = clips(read_frames(loose, size)[None]).flatten(0, 1), read_mel(loose)[None]
            times.append(time.perf_counter())
            visual(frames)
            times.append(time.perf_counter())
            audio(mel)
            times.append(time.perf_counter())
            for name, seconds in zip(found, np.diff(times), strict=True):
                found[name].append(float(seconds))
    return {name: float(np.median(values)) for name, values in found.items()}
