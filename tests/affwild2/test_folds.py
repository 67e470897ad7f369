"""Folds: whole videos, everything once, the same on every machine, balanced."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmt_dist.affwild2.folds import BINS, Folds, UnitSummary, divide, make_folds, read_folds, summarise, write_folds
from jmt_dist.config import FoldOptions
from jmt_dist.errors import UserError

BOTH = FoldOptions(policy="train+validation", seed=0)
ONLY = FoldOptions(policy="train-only", seed=0)


def unit(name: str, video: str = "", split: str = "train", frames: int = 100, cell: int = 12) -> UnitSummary:
    histogram = [0] * BINS**2
    histogram[cell] = frames
    return UnitSummary(name, video or name, split, frames, tuple(histogram))


def population(count: int, seed: int, pairs: int) -> list[UnitSummary]:
    """Units as the dataset's: log-normal lengths, each around its own place in V/A space, some videos with two people."""
    rng = np.random.default_rng(seed)
    units = []
    for i in range(count):
        rows = int(np.clip(np.exp(rng.normal(8.2, 0.9)), 73, 47_435))
        va = rng.normal(rng.normal([0.2, 0.25], [0.35, 0.25]), 0.1, (rows, 2)).clip(-1, 1).astype(np.float32)
        va[rng.random(rows) < 0.01] = np.nan
        video = f"v{i // 2}" if i < 2 * pairs else f"v{i}"
        split = "train" if int(video[1:]) % 6 else "validation"
        units.append(summarise(f"{video}_right" if i < 2 * pairs and i % 2 else video, video, split, va))
    return units


@st.composite
def small_units(draw: st.DrawFn) -> list[UnitSummary]:
    """Few videos of any sizes, without frames included: where balance is hard and ties are many."""
    units = []
    for i in range(draw(st.integers(5, 14))):
        for side in draw(st.sampled_from([("",), ("", "_right"), ("_left", "_right")])):
            split = draw(st.sampled_from(["train", "train", "validation"]))
            units.append(unit(f"v{i}{side}", f"v{i}", split, draw(st.integers(0, 400)), draw(st.integers(0, BINS**2 - 1))))
    return units


def check(folds: Folds, units: list[UnitSummary], pool: set[str]) -> None:
    video = {u.name: u.video for u in units}
    fives = folds.names[1:]
    assert folds.names == ("official", "fold-1", "fold-2", "fold-3", "fold-4", "fold-5")
    assert Counter(name for fold in fives for name in folds.validation(fold)) == dict.fromkeys(pool, 1)  # each unit once
    for fold in fives:
        train, validation = folds.train(fold), folds.validation(fold)
        assert {video[u] for u in train}.isdisjoint(video[u] for u in validation)
        assert list(train) == sorted(set(train)) and list(validation) == sorted(set(validation))


@settings(max_examples=60, deadline=None)
@given(units=small_units(), seed=st.integers(0, 5), random=st.randoms())
def test_both_splits_divided(units: list[UnitSummary], seed: int, random: object) -> None:
    options = FoldOptions(policy="train+validation", seed=seed)
    folds = make_folds(units, options)
    names = {u.name for u in units}
    check(folds, units, names)
    for fold in folds.names[1:]:
        assert set(folds.train(fold)) | set(folds.validation(fold)) == names
    mixed = list(units)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert make_folds(mixed, options) == folds


@settings(max_examples=60, deadline=None)
@given(units=small_units())
def test_only_train_divided(units: list[UnitSummary]) -> None:
    train = [u for u in units if u.split == "train"]
    if len({u.video for u in train}) < 5:
        with pytest.raises(UserError, match="cannot be divided"):
            make_folds(units, ONLY)
        return
    folds = make_folds(units, ONLY)
    check(folds, units, {u.name for u in train})
    video = {u.name: u.video for u in units}
    for fold in folds.names[1:]:
        held = {video[name] for name in folds.validation(fold)}
        # every official validation unit joins, but for those whose video is being validated on
        joined = {u.name for u in units if u.split == "validation" and u.video not in held}
        assert set(folds.train(fold)) == joined | {u.name for u in train if u.video not in held}


def test_official_is_the_split_as_shipped_and_test_units_are_in_no_fold() -> None:
    units = [unit(f"v{i}", split=("train", "validation", "test")[i % 3]) for i in range(30)]
    for options in (BOTH, ONLY):
        folds = make_folds(units, options)
        assert folds.train("official") == tuple(sorted(f"v{i}" for i in range(0, 30, 3)))
        assert folds.validation("official") == tuple(sorted(f"v{i}" for i in range(1, 30, 3)))
        assert not {name for fold in folds.names for name in folds.train(fold) + folds.validation(fold)} & {
            f"v{i}" for i in range(2, 30, 3)
        }


def shares(units: list[UnitSummary], folds: Folds) -> tuple[np.ndarray, np.ndarray]:
    """Of each part: its share of all frames [5], and the total-variation distance [5] of its V/A histogram from that of all."""
    by_name = {u.name: u for u in units}
    parts = [[by_name[name] for name in folds.validation(fold)] for fold in folds.names[1:]]
    counts = np.array([np.sum([u.histogram for u in part], axis=0) for part in parts], np.float64)
    frames = counts.sum(axis=1)
    everything = counts.sum(axis=0) / counts.sum()
    return frames / frames.sum(), np.abs(counts / frames[:, None] - everything).sum(axis=1) / 2


@pytest.mark.parametrize("seed", [0, 1])
def test_balance_at_the_size_of_the_dataset(seed: int) -> None:
    """432 units: within 0.2 % of all frames of a fifth, and nearer to the whole distribution than random division."""
    units = population(432, seed, pairs=16)
    frames, distance = shares(units, make_folds(units, FoldOptions(policy="train+validation", seed=seed)))
    assert np.abs(frames - 0.2).max() < 0.002
    rng = np.random.default_rng(0)
    random = []
    for _ in range(20):
        names = rng.permutation([u.name for u in units])
        cut = {f"fold-{k + 1}": ((), tuple(part)) for k, part in enumerate(np.array_split(names, 5))}
        random.append(shares(units, Folds("", 0, {"official": ((), ()), **cut}))[1].max())
    assert distance.max() < 0.1
    assert distance.max() < 0.6 * min(random)


def test_equal_units_are_divided_evenly() -> None:
    units = [unit(f"v{i}", cell=i % 5) for i in range(25)]
    frames, distance = shares(units, make_folds(units, BOTH))
    np.testing.assert_allclose(frames, 0.2)
    np.testing.assert_allclose(distance, 0, atol=1e-12)  # each part gets one unit of each cell


def test_one_giant_leaves_no_part_empty() -> None:
    units = [unit("giant", frames=1_000_000), *(unit(f"v{i}", frames=0) for i in range(4))]
    assert sorted(len(part) for part in divide(units, 0)) == [1, 1, 1, 1, 1]


def test_the_seed_gives_another_division() -> None:
    units = population(60, 3, pairs=4)
    hashes = {make_folds(units, FoldOptions(policy="train+validation", seed=seed)).hash for seed in range(4)}
    assert len(hashes) == 4


def test_the_division_never_changes_silently() -> None:
    """A published fold list must be made again by every later version: this is the one of 20 units, seed 0.

    If the rule is changed on purpose, `folds.VERSION` goes up and this list is renewed.
    """
    units = [unit(f"v{i}", frames=100 + 7 * i, cell=(3 * i) % 25) for i in range(20)]
    folds = make_folds(units, BOTH)
    assert {fold: folds.validation(fold) for fold in folds.names[1:]} == GOLDEN


GOLDEN = {
    "fold-1": ("v1", "v11", "v19", "v7"),
    "fold-2": ("v10", "v18", "v2", "v8"),
    "fold-3": ("v0", "v12", "v17", "v9"),
    "fold-4": ("v14", "v16", "v3", "v5"),
    "fold-5": ("v13", "v15", "v4", "v6"),
}


def test_too_few_videos() -> None:
    units = [unit(f"v{i}{side}", f"v{i}") for i in range(4) for side in ("_left", "_right")]
    with pytest.raises(UserError, match="4 videos cannot be divided into 5 folds"):
        make_folds(units, BOTH)


def test_a_name_given_twice() -> None:
    with pytest.raises(UserError, match="`v1` is given twice"):
        make_folds([*(unit(f"v{i}") for i in range(6)), unit("v1", split="validation")], BOTH)


def test_asking_for_what_is_not_there() -> None:
    folds = make_folds([unit(f"v{i}") for i in range(10)], BOTH)
    with pytest.raises(UserError, match="fold `official` has no validation units"):
        folds.validation("official")
    with pytest.raises(UserError, match="no fold `fold-6`") as error:
        folds.train("fold-6")
    assert "official, fold-1" in error.value.remedy
    assert folds.train("official")


def test_summary_counts_frames_by_cell() -> None:
    va = np.array([[-1, -1], [1, 1], [-0.6, 0.99], [-0.61, 0.0], [np.nan, np.nan], [0.0, 0.0]], np.float32)
    summary = summarise("a_left", "a", "train", va)
    counts = np.array(summary.histogram).reshape(BINS, BINS)
    assert (summary.valid, counts.sum()) == (5, 5)
    expected = np.histogram2d(*va[~np.isnan(va[:, 0])].astype(np.float64).T, bins=np.linspace(-1, 1, BINS + 1))[0]
    np.testing.assert_array_equal(counts, expected)
    assert summarise("a", "a", "train", np.full((3, 2), np.nan, np.float32)).histogram == (0,) * BINS**2


def test_file_round_trip(tmp_path: Path) -> None:
    folds = make_folds(population(30, 0, pairs=3), BOTH)
    path = tmp_path / "folds.json"
    write_folds(path, folds)
    again = read_folds(path)
    assert again == folds and again.hash == folds.hash and len(folds.hash) == 64
    assert [p.name for p in tmp_path.iterdir()] == ["folds.json"]
    write_folds(path, make_folds(population(30, 1, pairs=3), BOTH))  # replaced as a whole
    assert read_folds(path) != folds


def test_hash_is_of_the_content(tmp_path: Path) -> None:
    folds = make_folds([unit(f"v{i}") for i in range(10)], BOTH)
    data = json.loads(folds.to_json())
    reordered = json.dumps({key: data[key] for key in reversed(data)})
    assert Folds.from_json(reordered).hash == folds.hash
    data["folds"]["fold-1"]["train"].pop()
    with pytest.raises(UserError, match="was changed after it was written"):
        Folds.from_json(json.dumps(data))
    del data["hash"]  # the owner accepts the change
    assert Folds.from_json(json.dumps(data)).hash != folds.hash


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "policy": "x", "seed": 0, "folds": {"a": []}}', "null"])
def test_damaged_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "folds.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is not a list of folds"):
        read_folds(path)


def test_missing_file_and_other_version(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folds in"):
        read_folds(tmp_path / "folds.json")
    with pytest.raises(UserError, match="has version 2, not 1"):
        Folds.from_json('{"version": 2}')
