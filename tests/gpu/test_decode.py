"""Strips of all three modes through the decoder of the device, against Pillow frame by frame; sound against librosa."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from jmt_dist.config import DataOptions
from jmt_dist.data.geometry import SIZE, STRIP
from jmt_dist.data.graph import MEAN, STD
from jmt_dist.data.pipeline import ClipLoader
from jmt_dist.data.sample import Sample
from jmt_dist.data.strip import make_strip, split
from tests.data.test_spectrogram import OFFSETS, require_equal, sound_shards, sounds
from tests.data.tiny import tiny_sample, write_tiny
from tests.data.tree import jpeg, picture

SETTINGS = [{}, {"optimize": True}, {"progressive": True}]  # of the sources: strips of mode 0, 1 and 2
BLACK = (5, 40)  # frames without a picture
# another inverse transform and another interpolation of colour: some levels, mostly at edges of colour
MEAN_LEVELS, MOST_LEVELS = {"cpu": 0.0, "cuda": 1.5}, {"cpu": 0.01, "cuda": 48.0}


def strips() -> list[Sample]:
    """A sample of each mode, twice (another order of pictures): 71 different frames, two of them missing."""
    pictures = [picture(k) for k in range(STRIP)]
    made = []
    for unit, settings in enumerate(SETTINGS * 2):
        order = range(STRIP) if unit < len(SETTINGS) else reversed(range(STRIP))
        # optimised tables differ from frame to frame: mode 1; a progressive source is decoded and encoded again: mode 2
        files = [None if k in BLACK else jpeg(pictures[k], **settings) for k in order]
        strip = make_strip(files)
        assert strip.mode == unit % len(SETTINGS)
        made.append(replace(tiny_sample((unit, 0, 0)), strip=strip.data))
    return made


def alone(sample: Sample) -> NDArray[np.uint8]:
    """Its frames [71, 112, 112, 3], each taken out of the strip and decoded by Pillow."""
    return np.stack([np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")) for frame in split(sample.strip)])


@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_frames_are_pillow_s_in_order_and_place(device: torch.device, tmp_path: Path, load: float) -> None:
    """`load` is the share of the hardware decoder: on a GPU 0 is the CUDA decoder, on the CPU it says nothing."""
    samples = strips()
    shards = write_tiny(tmp_path / "shards", [len(samples)], samples)
    loader = ClipLoader(
        shards, data=DataOptions(threads=2, hw_decoder_load=load), batch=len(samples), streams=("visual",), offsets=[0], device=device
    )
    (batch,) = loader.batches()
    assert batch["frames"].device.type == device.type
    levels = batch["frames"].cpu().numpy() * np.array(STD, np.float32) + np.array(MEAN, np.float32)
    for row, unit in enumerate(batch["id"][:, 0].tolist()):
        wanted = alone(samples[unit]).astype(np.float32)
        # the first and last row of a frame may take colour from the neighbour in the strip
        found, wanted = levels[row][:, 1 : SIZE - 1], wanted[:, 1 : SIZE - 1]
        difference = np.abs(found - wanted)
        print(f"mode {unit % 3}, load {load}, {device.type}: mean {difference.mean():.4f}, most {difference.max():.1f} of 255 levels")
        assert difference.mean() <= MEAN_LEVELS[device.type] + 1e-3
        assert difference.max() <= MOST_LEVELS[device.type]
        small = found[:, ::4, ::4].reshape(STRIP, -1), wanted[:, ::4, ::4].reshape(STRIP, -1)
        nearest = np.abs(small[0][:, None] - small[1][None]).mean(axis=2).argmin(axis=1)
        black = {k if unit < 3 else STRIP - 1 - k for k in BLACK}
        for k in range(STRIP):
            if k in black:
                assert found[k].max() <= 2.5
            else:
                assert nearest[k] == k


def test_spectrograms_are_librosa_s(device: torch.device, tmp_path: Path) -> None:
    """A GPU makes them by DALI, a CPU by torch."""
    named = dict(enumerate(sounds()))
    shards = sound_shards(tmp_path)
    for batch in ClipLoader(shards, data=DataOptions(threads=2), batch=5, streams=("audio",), offsets=OFFSETS, device=device).batches():
        for unit, mel in zip(batch["id"][:, 0].tolist(), batch["mel"].cpu(), strict=True):
            name = named.pop(unit)
            for place, q in enumerate(OFFSETS):
                require_equal(mel[place].numpy(), name, q, "dali" if device.type == "cuda" else "torch")
    assert not named
