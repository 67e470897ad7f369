"""The loader on packed samples against Pillow and librosa, and its restart with pictures and sound (order and refusals: test_epochs)."""

from __future__ import annotations

import io
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jmt_dist.config import DataOptions, FoldOptions
from jmt_dist.data.geometry import MEAN, SIZE, STD, STRIP
from jmt_dist.data.pipeline import ClipLoader, clips
from jmt_dist.data.sample import Sample
from jmt_dist.data.shards import ShardSet, fold_shards
from jmt_dist.data.sound import MEL_MEAN, MEL_STD
from jmt_dist.data.strip import split
from jmt_dist.errors import UserError

from .test_spectrogram import librosa_db

DATA = DataOptions(threads=1, shuffle_buffer=16)


@pytest.fixture(scope="module")
def shards(packed: Path) -> ShardSet:
    return fold_shards(packed, FoldOptions(), "official", "train")


@pytest.fixture(scope="module")
def samples(shards: ShardSet) -> dict[tuple[int, ...], Sample]:
    """Every sample of the tars, read by tarfile, by (unit, segment, phase)."""
    found: dict[str, dict[str, bytes]] = {}
    for path in shards.tars:
        with tarfile.open(path) as tar:
            for info in tar:
                key, member = info.name.split(".", 1)
                source = tar.extractfile(info)
                assert source is not None
                found.setdefault(key, {})[member] = source.read()
    made = [Sample.from_members(members) for members in found.values()]
    return {tuple(sample.id[:3].tolist()): sample for sample in made}


def pixels(sample: Sample) -> NDArray[np.uint8]:
    """Its 71 frames [71, 112, 112, 3], each taken out of the strip and decoded alone by Pillow."""
    return np.stack([np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")) for frame in split(sample.strip)])


def grey_levels(frames: Tensor) -> NDArray[np.float32]:
    return frames.numpy() * np.array(STD, np.float32) + np.array(MEAN, np.float32)


def check_mel(mel: Tensor, sample: Sample, ends: list[int]) -> None:
    """`mel` [n, 64, 107] is librosa's of the windows that end at `ends`."""
    found = mel.double().numpy() * MEL_STD + MEL_MEAN
    wanted = librosa_db(np.frombuffer(sample.audio[44:], "<i2").astype(np.int16), np.array(ends))
    near = wanted > wanted.max(axis=(1, 2), keepdims=True) - 60
    assert found.shape == (len(ends), 64, 107)
    assert np.abs(found - wanted)[near].max() < 1e-3
    assert np.abs(found - wanted).max() < 1e-2


def test_dense_equals_pillow_and_librosa(shards: ShardSet, samples: dict[tuple[int, ...], Sample]) -> None:
    seen = []
    for batch in ClipLoader(shards, data=DATA, batch=3, offsets=[2, 5]).batches():
        assert batch["frames"].shape[1:] == (STRIP, SIZE, SIZE, 3)
        for row, ident in enumerate(batch["id"].tolist()):
            sample = samples[tuple(ident[:3])]
            seen.append(tuple(ident[:3]))
            # rows at the borders of frames depend on how a decoder interpolates colour
            assert np.abs(grey_levels(batch["frames"][row])[:, 1:-1] - pixels(sample)[:, 1:-1]).max() < 1e-3
            assert np.array_equal(batch["labels"][row].numpy(), sample.va, equal_nan=True)
            for place, q in enumerate((2, 5)):
                numbers = [q + 8 * j for j in (0, 3, 7)]
                assert np.array_equal(batch["va"][row, place, [0, 3, 7]].numpy(), sample.va[numbers], equal_nan=True)
                check_mel(batch["mel"][row, place, [0, 3, 7]], sample, sample.ends[numbers].tolist())
    assert len(seen) == len(set(seen)) == shards.samples


def test_clips_are_frames_in_order_and_no_copy() -> None:
    frames = torch.arange(2 * 71 * 4 * 4 * 3, dtype=torch.float32).view(2, 71, 4, 4, 3)
    found = clips(frames, 3)
    assert found.shape == (2, 8, 3, 8, 4, 4)
    for j, f in ((0, 0), (4, 5), (7, 7)):
        assert torch.equal(found[1, j, :, f], frames[1, 3 + 8 * j + f].permute(2, 0, 1))
    assert found.untyped_storage().data_ptr() == frames.untyped_storage().data_ptr()
    assert clips(frames[:1]).flatten(0, 1).is_contiguous(memory_format=torch.channels_last_3d)


def test_an_epoch_holds_every_sample_and_labels_follow_the_offset(shards: ShardSet, samples: dict[tuple[int, ...], Sample]) -> None:
    loader = ClipLoader(shards, data=DATA, batch=4, seed=3, size=32, crop=96, flip=True)
    offsets = set()
    for epoch in range(2):
        batches = list(loader.batches(epoch, 0))
        assert len(batches) == loader.steps
        ids = [tuple(row[:3]) for batch in batches for row in batch["id"].tolist()]
        assert len(set(ids)) == shards.samples
        for batch in batches:
            assert batch["frames"].shape == (4, 64, 32, 32, 3) and batch["mel"].shape == (4, 8, 64, 107)
            for row, (ident, q) in enumerate(zip(batch["id"].tolist(), batch["q"].tolist(), strict=True)):
                wanted = samples[tuple(ident[:3])].va[[q + 8 * j for j in range(8)]]
                assert np.array_equal(batch["va"][row].numpy(), wanted, equal_nan=True)
                offsets.add(q)
    assert offsets == set(range(8))


def place_of(found: NDArray[np.float32], picture: NDArray[np.uint8]) -> tuple[int, int, bool]:
    """Where in a picture [112, 112, 3] a crop [96, 96, 3] was taken, and whether it was mirrored; by trying all."""
    probe = found[40]
    for mirrored in (False, True):
        rows = sliding_window_view(picture, 96, axis=1)  # [112, 17, 3, 96]
        differences = np.abs(rows - (probe[::-1] if mirrored else probe).T).max(axis=(2, 3))
        y, x = np.unravel_index(differences.argmin(), differences.shape)
        if differences[y, x] < 1e-3:
            return int(y) - 40, int(x), mirrored
    raise AssertionError("the crop is nowhere in the picture")


def test_a_subsequence_is_one_temporal_crop_one_crop_and_one_flip(shards: ShardSet, samples: dict[tuple[int, ...], Sample]) -> None:
    places = []
    loader = ClipLoader(shards, data=DATA, batch=6, seed=3, size=96, crop=96, flip=True)
    for batch in islice(loader.batches(), 2):
        for row, (ident, q) in enumerate(zip(batch["id"].tolist(), batch["q"].tolist(), strict=True)):
            sample = samples[tuple(ident[:3])]
            pictures, found = pixels(sample)[q : q + 64], grey_levels(batch["frames"][row])
            check_mel(batch["mel"][row], sample, sample.ends[[q + 8 * j for j in range(8)]].tolist())
            shown = int(pictures.std(axis=(1, 2, 3)).argmax())  # frames without a picture are black
            y, x, mirrored = place_of(found[shown], pictures[shown])
            wanted = pictures[:, y : y + 96, x : x + 96]
            inside = slice(1, 95)  # a frame's own border row may be the crop's first or last
            assert np.abs(found - (wanted[:, :, ::-1] if mirrored else wanted))[:, inside].max() < 1e-3
            places.append((y, x, mirrored))
    assert len(set(places)) > 9 and {mirrored for *_, mirrored in places} == {False, True}
    assert all(0 <= y <= 16 and 0 <= x <= 16 for y, x, _ in places)


def test_restart_is_exact_at_any_step(packed: Path) -> None:
    """Frames, sound, labels and draws; in mid-epoch, at an epoch's end, in the second and the third epoch."""
    few = fold_shards(packed, FoldOptions(), "official", "validation")
    options: dict[str, Any] = {"data": DATA, "batch": 2, "seed": 7, "size": 32, "crop": 100, "flip": True}
    whole, states, batches = ClipLoader(few, **options), {}, []
    assert whole.steps == 4
    for after in range(1, 14):
        batch = next(whole.batches(whole.epoch, whole.done))
        batches.append({name: value.clone() for name, value in batch.items()})
        states[after] = whole.state()
    for after in (1, 4, 6, 9):
        again = ClipLoader(few, **options)
        again.restore(states[after])
        assert (again.epoch, again.done) == divmod(after, 4)
        for wanted in batches[after : after + 4]:
            found = next(again.batches(again.epoch, again.done))
            for name in wanted:
                assert torch.equal(torch.nan_to_num(wanted[name]), torch.nan_to_num(found[name])), name


def test_more_ranks_than_samples_are_refused(shards: ShardSet) -> None:
    with pytest.raises(UserError, match="fewer than"):
        ClipLoader(shards, data=DATA, batch=1, world=shards.samples + 1)
