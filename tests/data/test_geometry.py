"""Geometry by brute force: every source frame ends exactly one clip, and every clip is the 32 frames before its end."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jmt_dist.data import geometry
from jmt_dist.data.geometry import clip_end, end_frames, samples_of, strip_frames
from jmt_dist.data.pipeline import clips
from jmt_dist.data.sample import labels_of


def ends_by_brute_force(rows: int) -> Counter[int]:
    """End frames of all clips of a unit, by the words of DESIGN section 4 and nothing else."""
    ends: Counter[int] = Counter()
    for m in range(rows // 256 + 1):
        for p in range(4):
            if 256 * m + 1 + p > rows:
                continue
            for q in range(8):
                for j in range(8):
                    ends[256 * m + 1 + p + 4 * (q + 8 * j)] += 1
    return ends


@pytest.mark.parametrize("lengths", [range(1, 800), (4_097,), (47_435,)], ids=["1..799", "4097", "47435"])
def test_every_frame_ends_exactly_one_clip(lengths: range | tuple[int, ...]) -> None:
    for rows in lengths:
        ends = np.concatenate([end_frames(m, p) for m, p in samples_of(rows)])
        assert Counter(ends.tolist()) == ends_by_brute_force(rows)
        counts = np.bincount(ends)
        assert counts[0] == 0 and (counts[1 : rows + 1] == 1).all() and counts.max() == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 255, 256, 257, 260, 4_097])
def test_samples_begin_inside_the_unit_and_none_is_missing(rows: int) -> None:
    found = samples_of(rows)
    assert len(found) == len(set(found))
    everything = {(m, p) for m in range(rows) for p in range(4) if 256 * m + 1 + p <= rows}
    assert set(found) == everything


@pytest.mark.parametrize(("m", "p"), [(0, 0), (0, 3), (1, 2), (185, 1)])
def test_clip_is_every_fourth_of_the_32_frames_up_to_its_end(m: int, p: int) -> None:
    strip = strip_frames(m, p)
    assert strip.shape == (71,)
    for q in range(8):
        for j in range(8):
            end = clip_end(m, p, q, j)
            assert strip[q + 8 * j : q + 8 * j + 8].tolist() == list(range(end - 28, end + 1, 4))
            assert end_frames(m, p)[q + 8 * j] == end


def test_the_four_phases_of_a_segment_hold_its_256_frames_once() -> None:
    frames = np.concatenate([strip_frames(3, p)[7:] for p in range(4)])
    assert sorted(frames.tolist()) == list(range(3 * 256 + 1, 4 * 256 + 1))


def test_window_is_32_frames_at_30_per_second_and_gives_107_columns() -> None:
    assert round(32 / 30 * geometry.RATE) == geometry.WINDOW
    assert 1 + geometry.WINDOW // 441 == geometry.MEL_COLUMNS


def walk_back(end: int) -> list[int]:
    """The 8 frames of the clip that ends at source frame `end`: every 4th, going back."""
    frames = [end]
    while len(frames) < 8:
        frames.insert(0, frames[0] - 4)
    return frames


def clips_by_brute_force(rows: int) -> dict[int, tuple[int, int, int, int]]:
    """End frame to (m, p, q, j) for every frame of a unit, by counting: phases turn within a segment, then offsets, then clips."""
    found, counter = {}, itertools.product(range(rows), range(8), range(8), range(4))
    for end in range(1, rows + 1):
        m, j, q, p = next(counter)
        found[end] = (m, p, q, j)
    return found


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3_000))
def test_every_frame_of_any_unit_has_its_clip_in_a_sample_that_exists(rows: int) -> None:
    wanted = clips_by_brute_force(rows)
    samples = samples_of(rows)
    assert {(m, p) for m, p, _, _ in wanted.values()} == set(samples) and len(samples) == len(set(samples))
    strips = {sample: strip_frames(*sample).tolist() for sample in samples}
    ends = {sample: end_frames(*sample).tolist() for sample in samples}
    for end, (m, p, q, j) in wanted.items():
        assert clip_end(m, p, q, j) == ends[m, p][q + 8 * j] == end
        assert strips[m, p][q + 8 * j :][:8] == walk_back(end)
    assert all(len(strip) == 71 for strip in strips.values())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 600), st.data())
def test_labels_and_clips_of_any_sample_are_those_of_its_frames(rows: int, data: st.DataObject) -> None:
    """A unit whose frame i shows the number i and whose label row i says (i, -i)."""
    m, p = data.draw(st.sampled_from(samples_of(rows)))
    q = data.draw(st.integers(0, 7))
    va = np.array([(i, -i) for i in range(1, rows + 1)], np.float32)
    labels = labels_of(va, m, p)
    frames = torch.tensor([[max(0, i) if i <= rows else 0] * 3 for i in strip_frames(m, p).tolist()]).view(1, 71, 1, 1, 3)
    subsequence = clips(frames, q)
    assert subsequence.shape == (1, 8, 3, 8, 1, 1)
    for j in range(8):
        end = 256 * m + 1 + p + 4 * (q + 8 * j)
        shown = [i if 1 <= i <= rows else 0 for i in walk_back(end)]
        assert subsequence[0, j, :, :, 0, 0].tolist() == [shown] * 3
        wanted = (end, -end) if end <= rows else (np.nan, np.nan)
        assert np.array_equal(labels[q + 8 * j], np.array(wanted, np.float32), equal_nan=True)
