"""The DALI loader against Pillow and librosa, and its order, restart and refusals."""

from __future__ import annotations

import io
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from jmt_dist.config import DataOptions, FoldOptions
from jmt_dist.data.geometry import SIZE, STRIP, WINDOW
from jmt_dist.data.graph import MEAN, STD
from jmt_dist.data.pipeline import ClipLoader, clips
from jmt_dist.data.sample import Sample
from jmt_dist.data.shards import ShardSet, fold_shards
from jmt_dist.errors import UserError

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


def mel_of(sample: Sample, n: int) -> np.ndarray:
    """The log-mel of window n by librosa, in dB."""
    pcm = np.frombuffer(sample.audio[44:], "<i2").astype(np.float64) / 32768
    window = pcm[sample.ends[n] - WINDOW : sample.ends[n]]
    power = librosa.feature.melspectrogram(
        y=window, sr=44_100, n_fft=1024, win_length=882, hop_length=441, n_mels=64, htk=True, norm=None, center=True, pad_mode="reflect"
    )
    db = 10 * np.log10(np.maximum(power, 1e-10))
    return np.maximum(db, db.max() - 80)


def test_dense_equals_pillow_and_librosa(shards: ShardSet, samples: dict[tuple[int, ...], Sample]) -> None:
    seen = []
    for batch in ClipLoader(shards, data=DATA, batch=3, offsets=[2, 5]).batches():
        assert batch["frames"].shape[1:] == (STRIP, SIZE, SIZE, 3)
        for row, ident in enumerate(batch["id"].tolist()):
            sample = samples[tuple(ident[:3])]
            seen.append(tuple(ident[:3]))
            picture = np.asarray(Image.open(io.BytesIO(sample.strip))).reshape(STRIP, SIZE, SIZE, 3)
            wanted = (picture[:, 1:-1].astype(np.float64) - MEAN) / STD
            # rows at the borders of frames depend on how a decoder interpolates colour; inside, one grey level at most
            assert np.abs(batch["frames"][row, :, 1:-1].numpy() - wanted).max() < 1.01 / min(STD)
            assert np.array_equal(batch["labels"][row].numpy(), sample.va, equal_nan=True)
            for place, q in enumerate((2, 5)):
                for j in (0, 3, 7):
                    assert np.array_equal(batch["va"][row, place, j].numpy(), sample.va[q + 8 * j], equal_nan=True)
                    db = batch["mel"][row, place, j].double().numpy() * 19.895 - 14.8
                    reference = mel_of(sample, q + 8 * j)
                    near = reference > reference.max() - 60
                    assert db.shape == (64, 107)
                    assert np.abs(db - reference)[near].max() < 1e-3
                    assert np.abs(db - reference).max() < 1e-2
    assert len(seen) == len(set(seen)) == shards.samples


def test_clips_are_frames_in_order_and_no_copy() -> None:
    frames = torch.arange(2 * 71 * 4 * 4 * 3, dtype=torch.float32).view(2, 71, 4, 4, 3)
    found = clips(frames, 3)
    assert found.shape == (2, 8, 3, 8, 4, 4)
    for j, f in ((0, 0), (4, 5), (7, 7)):
        assert torch.equal(found[1, j, :, f], frames[1, 3 + 8 * j + f].permute(2, 0, 1))
    assert found.untyped_storage().data_ptr() == frames.untyped_storage().data_ptr()
    assert clips(frames[:1]).flatten(0, 1).is_contiguous(memory_format=torch.channels_last_3d)


def collect(loader: ClipLoader, epochs: int) -> list[dict[str, Tensor]]:
    return [{k: v.clone() for k, v in batch.items()} for epoch in range(epochs) for batch in loader.batches(epoch, 0)]


def test_an_epoch_holds_every_sample_and_labels_follow_the_offset(shards: ShardSet, samples: dict[tuple[int, ...], Sample]) -> None:
    loader = ClipLoader(shards, data=DATA, batch=4, seed=3, size=32, crop=96, flip=True)
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


@pytest.mark.parametrize("after", [1, 4, 9])
def test_restart_is_exact_at_any_step(shards: ShardSet, after: int) -> None:
    options: dict[str, Any] = {"data": DATA, "batch": 4, "seed": 7, "size": 32, "crop": 100, "flip": True}
    whole = ClipLoader(shards, **options)
    epoch, done = divmod(after, whole.steps)
    before = list(islice(stream(whole, 0, 0), after))
    state = whole.state()
    wanted = [{k: v.clone() for k, v in b.items()} for b in islice(stream(whole, epoch, done, fresh=False), 7)]
    again = ClipLoader(shards, **options)
    again.restore(state)
    found = [{k: v.clone() for k, v in b.items()} for b in islice(stream(again, epoch, done), 7)]
    assert len(before) == after and len(found) == 7
    for a, b in zip(wanted, found, strict=True):
        for name in a:
            assert torch.equal(torch.nan_to_num(a[name]), torch.nan_to_num(b[name])), name


def stream(loader: ClipLoader, epoch: int, done: int, fresh: bool = True) -> Any:
    """Batches from here on, epoch after epoch."""
    while True:
        yield from loader.batches(epoch, done)
        epoch, done = epoch + 1, 0


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_samples(shards: ShardSet, world: int) -> None:
    loaders = [ClipLoader(shards, data=DATA, batch=2, rank=rank, world=world, offsets=[0], streams=()) for rank in range(world)]
    ids = [tuple(row[:3]) for loader in loaders for batch in loader.batches() for row in batch["id"].tolist()]
    assert len(ids) == len(set(ids)) == shards.samples
    training = [ClipLoader(shards, data=DATA, batch=2, rank=rank, world=world, streams=(), seed=1) for rank in range(world)]
    steps = [len(list(loader.batches(0, 0))) for loader in training]
    assert steps == [loader.steps for loader in training] and len(set(steps)) == 1


@pytest.mark.parametrize(("change", "words"), [({"batch": 2}, "batch 4"), ({"world": 2}, "ranks 1")])
def test_a_state_of_another_job_is_refused(shards: ShardSet, change: dict[str, int], words: str) -> None:
    options: dict[str, Any] = {"data": DATA, "batch": 4, "streams": ()}
    loader = ClipLoader(shards, **options)
    next(loader.batches(0, 0))
    with pytest.raises(UserError, match=words):
        ClipLoader(shards, **{**options, **change}).restore(loader.state())


def test_more_ranks_than_samples_are_refused(shards: ShardSet) -> None:
    with pytest.raises(UserError, match="fewer than"):
        ClipLoader(shards, data=DATA, batch=1, world=shards.samples + 1)
