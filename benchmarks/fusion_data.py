"""Features with a planted signal, of any number of samples, written by the program's own writer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from jmt_dist.data.feature_tars import WIDTH, FeatureWriter, write_description
from jmt_dist.data.geometry import CLIPS, OFFSETS, SUBSEQUENCE

PER_TAR = 256  # as the features stage writes them
PHASES = 4  # samples of a segment
SIGNAL = 2.0  # of a label of 1, in standard deviations of the noise, spread over the features
POOL = 1 << 24  # noise is cut from so many numbers at random places: drawing 2 billion would take minutes


def planted(samples: int, seed: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]:
    """(ident [4], visual, audio [8, 8, 512], labels [64, 2]) of samples of units of 160; valence is in the face, arousal in the voice."""
    directions = np.random.default_rng(0).standard_normal((2, WIDTH)).astype(np.float32) / np.sqrt(WIDTH).astype(np.float32)
    random = np.random.default_rng(seed)
    noise = random.standard_normal(POOL, dtype=np.float32)
    size = OFFSETS * CLIPS * WIDTH
    for number in range(samples):
        unit, place = divmod(number, 160)
        walk = np.cumsum(random.standard_normal((SUBSEQUENCE, 2)), axis=0) * 0.05 + random.uniform(-0.6, 0.6, 2)
        labels = np.tanh(walk).astype(np.float32)
        by_offset = labels.reshape(CLIPS, OFFSETS, 2).swapaxes(0, 1)
        streams = []
        for target in range(2):
            start = int(random.integers(POOL - size))
            signal = by_offset[..., target, None] * directions[target] * (SIGNAL * WIDTH**0.5)
            streams.append(noise[start : start + size].reshape(OFFSETS, CLIPS, WIDTH) + signal)
        ident = np.array([unit, place // PHASES, place % PHASES, 0], np.int32)
        yield ident, streams[0], streams[1], labels


def write_planted(folder: Path, part: str, samples: int, seed: int) -> None:
    """Write `samples` samples of a part to a features folder."""
    for begin in range(0, samples, PER_TAR):
        if begin == 0:
            source = planted(samples, seed)
        writer = FeatureWriter(folder, part, f"{begin:06d}")
        for _ in range(min(PER_TAR, samples - begin)):
            ident, visual, audio, labels = next(source)
            writer.add(ident, torch.from_numpy(visual), torch.from_numpy(audio), labels)
        writer.close()


def write_all(folder: Path, train: int, validation: int) -> int:
    """Write both parts and the description; returns the bytes on disk."""
    write_planted(folder, "train", train, 1)
    write_planted(folder, "validation", validation, 2)
    write_description(folder, list(range(OFFSETS)))
    return sum(path.stat().st_size for path in folder.iterdir())
