"""Feature shards, and the order in which the fusion sees them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from jmt_dist.data.feature_tars import (
    FeatureType,
    FeatureWriter,
    feature_damage,
    read_description,
    stored_samples,
    write_description,
)
from jmt_dist.data.features import FeatureLoader, FeatureSet, epoch_order, read_features
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


def write(folder: Path, made: FeatureSet, ranks: int, dtype: FeatureType = "float16") -> None:
    assert isinstance(made.visual, np.ndarray) and isinstance(made.audio, np.ndarray)
    for rank in range(ranks):
        writer = FeatureWriter(folder, "train", f"{rank:05d}", dtype)
        for row in range(rank, len(made.ident), ranks):
            writer.add(made.ident[row], torch.from_numpy(made.visual[row]), torch.from_numpy(made.audio[row]), made.labels[row])
        writer.close()
    write_description(folder, made.offsets, dtype)


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("train-*.tar"))


def everything(made: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
    """Features of all samples and offsets, sample by sample."""
    return made.take(*(place.ravel() for place in np.indices((len(made.ident), len(made.offsets)))))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(("ranks", "dtype"), [(1, "float16"), (3, "float16"), (3, "float32")])
def test_come_back_in_one_order_whoever_wrote_them(tmp_path: Path, ranks: int, dtype: FeatureType, mmap: bool) -> None:
    made = features(7, (1, 5))
    write(tmp_path, made, ranks, dtype)
    found = read_features(tmp_path, "train", mmap)
    assert found.offsets == (1, 5)
    assert np.array_equal(found.labels, made.labels) and np.array_equal(found.ident, made.ident)
    for mine, theirs in zip(everything(found), (made.visual, made.audio), strict=True):
        assert mine.dtype == np.float32 and np.array_equal(mine.reshape(7, 2, 8, 512), theirs)
    for offset, place in ((5, 1), (1, 0)):
        for mine, theirs in zip(everything(found.select([offset])), (made.visual, made.audio), strict=True):
            assert np.array_equal(mine, theirs[:, place])


def test_what_a_rank_repeats_comes_once(tmp_path: Path) -> None:
    made = features(5, (0,))
    write(tmp_path, made, 2)
    first = tars(tmp_path)[0]
    first.with_name(first.name.replace("train-00000", "train-00002")).write_bytes(first.read_bytes())
    write_description(tmp_path, made.offsets)
    assert np.array_equal(read_features(tmp_path, "train").ident, made.ident)
    assert stored_samples(tmp_path, "train", 1, "float16").tolist() == made.ident[:, :3].tolist()


def test_float32_keeps_every_bit_and_float16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    made = features(2, (0,))
    exact = (torch.arange(8 * 512.0).reshape(1, 8, 512) * 1e-3 + 1e6).sin() * 7e4
    writer = FeatureWriter(tmp_path / "full", "train", "0", "float32")
    writer.add(made.ident[0], exact, -exact, made.labels[0])
    writer.close()
    write_description(tmp_path / "full", [0], "float32")
    visual, audio = everything(read_features(tmp_path / "full", "train"))
    assert np.array_equal(visual, exact) and np.array_equal(audio, -exact)
    writer = FeatureWriter(tmp_path / "half", "train", "0")
    with pytest.raises(UserError, match=r"visual feature of sample 00000-0000-0 is too large.*dtype=float32"):
        writer.add(made.ident[0], exact, exact / 10, made.labels[0])
    with pytest.raises(UserError, match="audio backbone gives NaN"):
        writer.add(made.ident[0], exact / 10, exact * float("nan"), made.labels[0])


def test_plain_webdataset_reads_them(tmp_path: Path) -> None:
    made = features(3, (0,))
    write(tmp_path, made, 1)
    rows = list(webdataset.WebDataset(str(tars(tmp_path)[0]), shardshuffle=False))
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
    (tmp_path / "features.json").write_text('{"version": 1, "offsets": [0], "ranks": 1}')
    with pytest.raises(UserError, match="another version"):
        read_features(tmp_path, "train")


@pytest.mark.parametrize("fault", ["short", "long", "renamed", "other type"])
def test_damaged_tars_are_refused_and_computed_again(tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, features(4, (0,)), 2, "float32" if fault == "other type" else "float16")
    if fault == "other type":
        (tmp_path / "features.json").write_text('{"version": 2, "offsets": [0], "dtype": "float16"}')
    path = tars(tmp_path)[1]
    data = path.read_bytes()
    if fault == "short":
        path.write_bytes(data[:-20_000])
    elif fault == "long":
        path.write_bytes(data + data[:512])
    elif fault == "renamed":
        path.write_bytes(data.replace(b"visual.f16", b"visual.f15"))
    with pytest.raises(UserError, match="whole samples"):
        read_features(tmp_path, "train")
    left = stored_samples(tmp_path, "train", 1, "float16")
    assert len(left) == (0 if fault == "other type" else 2) and not path.exists()
    assert "computed again" in capsys.readouterr().out


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))


def last(path: Path) -> int:
    return path.stat().st_size - 1


@pytest.mark.parametrize("place", [3, 600, 5000, 40_000, last])
def test_one_bit_that_is_not_as_it_was_stored_is_found_wherever_it_is(tmp_path: Path, place: int | Callable[[Path], int]) -> None:
    made = features(6, (0,))
    write(tmp_path, made, 2)
    assert feature_damage(tmp_path, ["train"]) == ""
    path = tars(tmp_path)[1]
    flip(path, place(path) if callable(place) else place)
    assert feature_damage(tmp_path, ["train"]) == f"{path} is damaged: its bytes are not those that were stored"
    assert feature_damage(tmp_path, ["validation"]) == ""  # another part is another's trouble
    left = stored_samples(tmp_path, "train", 1, "float16")  # a start that goes on makes it again
    assert left.tolist() == made.ident[::2, :3].tolist() and not path.exists()


def test_a_tar_cut_removed_or_in_the_place_of_another_is_found(tmp_path: Path) -> None:
    for fault in ("cut", "removed", "swapped", "listed otherwise", "list gone"):
        folder = tmp_path / fault
        write(folder, features(6, (0,)), 2)
        one, other = tars(folder)
        if fault == "cut":
            other.write_bytes(other.read_bytes()[:-10_240])
            said = f"{other} has {last(other) + 1} bytes, not the {last(other) + 1 + 10_240} that were stored"
        elif fault == "removed":
            other.unlink()
            said = f"{other} is missing"
        elif fault == "swapped":
            one.rename(folder / "kept")
            other.rename(one)
            (folder / "kept").rename(other)
            said = f"{one} is damaged: its bytes are not those that were stored"
        elif fault == "listed otherwise":
            path = folder / "features.json"
            path.write_text(path.read_text().replace('"samples": 3', '"samples": 4'))
            said = f"{path} is damaged: its bytes are not those that were stored"
        else:
            (folder / "features.json").unlink()
            said = f"{folder} holds no finished features"
        assert feature_damage(folder, ["train"]) == said
        if fault not in ("swapped",):  # which only the bytes tell
            with pytest.raises(UserError):
                read_features(folder, "train")


def test_features_stored_before_tars_had_digests_are_read_and_known_as_such(tmp_path: Path) -> None:
    made = features(6, (0,))
    write(tmp_path, made, 2)
    assert read_description(tmp_path).checkable
    for number, path in enumerate(tars(tmp_path)):
        path.rename(tmp_path / f"train-{number:05d}.tar")
    (tmp_path / "features.json").write_text('{"version": 2, "offsets": [0], "dtype": "float16", "width": 512}')
    assert not read_description(tmp_path).checkable and feature_damage(tmp_path, ["train"]) == ""
    assert np.array_equal(read_features(tmp_path, "train").ident, made.ident)
    assert len(stored_samples(tmp_path, "train", 1, "float16")) == 0  # where the stage goes on, it stores them with digests


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
