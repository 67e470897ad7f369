"""Feature shards, and the order in which the fusion sees them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from jmt_dist.data.features import FeatureLoader, FeatureSet, FeatureWriter, epoch_order, read_features, write_description
from jmt_dist.errors import UserError


def features(samples: int, offsets: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7), seed: int = 0) -> FeatureSet:
    random = np.random.default_rng(seed)
    shape = (samples, len(offsets), 8, 512)
    return FeatureSet(
        random.standard_normal(shape).astype("<f2"),
        random.standard_normal(shape).astype("<f2"),
        random.uniform(-1, 1, (samples, 64, 2)).astype("<f4"),
        np.stack([np.arange(samples), np.zeros(samples), np.arange(samples) % 4, np.zeros(samples)], axis=1).astype("<i4"),
        offsets,
    )


def write(folder: Path, made: FeatureSet, ranks: int) -> None:
    for rank in range(ranks):
        writer = FeatureWriter(folder, "train", rank)
        for row in range(rank, len(made.ident), ranks):
            writer.add(made.ident[row], torch.from_numpy(made.visual[row]), torch.from_numpy(made.audio[row]), made.labels[row])
        writer.close()
    write_description(folder, made.offsets, ranks)


@pytest.mark.parametrize("ranks", [1, 3])
def test_come_back_in_one_order_whoever_wrote_them(tmp_path: Path, ranks: int) -> None:
    made = features(7, (1, 5))
    write(tmp_path, made, ranks)
    found = read_features(tmp_path, "train")
    assert found.offsets == (1, 5)
    for name in ("visual", "audio", "labels", "ident"):
        assert np.array_equal(getattr(found, name), getattr(made, name)), name


def test_plain_webdataset_reads_them(tmp_path: Path) -> None:
    made = features(3, (0,))
    write(tmp_path, made, 1)
    rows = list(webdataset.WebDataset(str(tmp_path / "train-00000.tar"), shardshuffle=False))
    assert [np.frombuffer(row["visual.f16"], "<f2").shape for row in rows] == [(8 * 512,)] * 3


def test_labels_of_offsets_are_those_of_their_clips() -> None:
    made = features(4, (2, 6))
    for sample, (place, q), j in itertools.product(range(4), enumerate((2, 6)), range(8)):
        assert np.array_equal(made.va()[sample, place, j], made.labels[sample, q + 8 * j])


def test_missing_and_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished features"):
        read_features(tmp_path, "train")
    write(tmp_path, features(2), 1)
    with pytest.raises(UserError, match="part validation"):
        read_features(tmp_path, "validation")


def test_an_epoch_takes_each_sample_once_a_pass_and_no_offset_twice() -> None:
    passes = epoch_order(50, 8, 5, seed=1, epoch=3)
    assert len(passes) == 5
    for one in passes:
        assert sorted(one[:, 0]) == list(range(50))
    for sample in range(50):
        taken = [int(one[one[:, 0] == sample, 1][0]) for one in passes]
        assert len(set(taken)) == 5
    again = epoch_order(50, 8, 5, seed=1, epoch=3)
    assert all(np.array_equal(a, b) for a, b in zip(passes, again, strict=True))
    assert not np.array_equal(passes[0], epoch_order(50, 8, 5, seed=1, epoch=4)[0])


@pytest.mark.parametrize(("batch", "ranks", "world"), [(4, 1, 1), (4, 2, 2), (4, 4, 4), (2, 2, 5), (7, 3, 3)])
def test_ranks_divide_the_same_batches(batch: int, ranks: int, world: int) -> None:
    made = features(10)
    single = [b for b in FeatureLoader(made, batch=batch, passes=2, seed=5).batches(2)]
    loaders = [FeatureLoader(made, batch=batch, passes=2, seed=5, rank=r, ranks=ranks) for r in range(world)]
    several = [list(loader.batches(2)) for loader in loaders]
    assert {len(b) for b in several} == {len(single)} == {loaders[0].steps}
    for step, whole in enumerate(single):
        parts = [several[r][step] for r in range(world)]
        labelled = [p for r, p in enumerate(parts) if not torch.isnan(p["va"]).all()]
        for name in ("visual", "audio", "va", "id", "q"):
            assert torch.equal(torch.cat([p[name] for p in labelled]), whole[name]), name
        assert all(torch.isnan(parts[r]["va"]).all() for r in range(ranks, world))
        pairs = list(zip(whole["id"][:, 0].tolist(), whole["q"].tolist(), strict=True))
        assert len({sample for sample, _ in pairs}) == len(pairs)


def test_resumes_in_the_middle_of_an_epoch() -> None:
    made = features(9)
    whole = list(FeatureLoader(made, batch=4, passes=3, seed=5).batches(1))
    rest = list(FeatureLoader(made, batch=4, passes=3, seed=5).batches(1, done=5))
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a["visual"], b["visual"]) for a, b in zip(whole[5:], rest, strict=True))
