"""Geometry by brute force: every source frame ends exactly one clip, and every clip is the 32 frames before its end."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from jmt_dist.data import geometry
from jmt_dist.data.geometry import clip_end, end_frames, samples_of, strip_frames


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
