import time

import numpy as np
import pytest

from jmt_dist.errors import UserError
from jmt_dist.evaluate.bootstrap import interval, paired, video_sums
from jmt_dist.evaluate.metric import ccc, scores


def videos(count, seed=0, frames=60, noise=0.3):
    rng = np.random.default_rng(seed)
    target = np.concatenate([rng.uniform(-0.6, 0.6, 2) + rng.normal(0, 0.2, (frames, 2)) for _ in range(count)])
    prediction = 0.8 * target + rng.normal(0, noise, target.shape) + 0.1
    groups = np.repeat([f"video{i}" for i in range(count)], frames)
    return prediction, target, groups


def test_equals_resampling_the_frames_themselves():
    prediction, target, groups = videos(12)
    target[::9] = np.nan
    names = np.unique(groups)
    rounds, seed = 200, 5
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=rounds)
    drawn = []
    for row in counts:  # the slow way: build every resample frame by frame
        index = np.concatenate([np.flatnonzero(groups == name) for name, times in zip(names, row, strict=True) for _ in range(times)])
        v, a = (ccc(prediction[index, k], target[index, k]) for k in range(2))
        drawn.append((v, a, (v + a) / 2))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    got = interval(prediction, target, groups, rounds, seed)
    for i, name in enumerate(("valence", "arousal", "average")):
        assert got[name] == pytest.approx((low[i], high[i]), abs=1e-10)


def test_resamples_videos_not_frames():
    prediction, target, groups = videos(20, frames=200)
    by_video = interval(prediction, target, groups)["average"]
    by_frame = interval(prediction, target, np.arange(len(groups)).astype(str))["average"]
    point = scores(prediction, target).average
    assert by_video[0] < point < by_video[1]
    assert by_video[1] - by_video[0] > 1.5 * (by_frame[1] - by_frame[0])


def test_interval_covers_the_population_value():
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(60):
        p, t, g = videos(30, seed=1000 + trial)
        low, high = interval(p, t, g, 400, seed=int(rng.integers(1 << 30)))["valence"]
        hits += low <= POPULATION <= high
    assert 49 <= hits <= 60  # nominal 57; percentile intervals of 30 videos run a little short


# CCC of the generator above in the limit of many videos: var of labels 0.36/3 + 0.04, x = 0.8 y + noise 0.3 + 0.1
VAR = 1.2**2 / 12 + 0.2**2
POPULATION = 2 * 0.8 * VAR / (0.64 * VAR + 0.09 + VAR + 0.1**2)


def test_population_value_is_what_the_generator_gives():
    p, t, _ = videos(4000)
    assert ccc(p[:, 0], t[:, 0]) == pytest.approx(POPULATION, abs=0.01)


def test_seeds_are_averaged():
    p, t, g = videos(10)
    other = p + np.random.default_rng(3).normal(0, 0.5, p.shape)
    both = video_sums(np.stack([p, other]), t, g)
    assert both.shape == (2, 10, 2, 6)
    a, b, mean = (interval(x, t, g)["average"] for x in (p, other, np.stack([p, other])))
    assert b[0] < mean[0] < a[0] and b[1] < mean[1] < a[1]


def test_paired_difference_sees_what_single_intervals_hide():
    p, t, g = videos(15, noise=0.35)
    better = p + 0.05 * (t - p)
    single_a, single_b = interval(better, t, g)["average"], interval(p, t, g)["average"]
    assert single_a[0] < single_b[1]  # the intervals overlap
    difference = paired(better, p, t, g)
    assert difference.interval["average"][0] > 0 and difference.not_better["average"] == 0
    assert difference.value["average"] == pytest.approx(scores(better, t).average - scores(p, t).average, abs=1e-12)
    same = paired(p, p, t, g)
    assert same.value["average"] == 0 and same.not_better["average"] == same.not_worse["average"] == 1


def test_nothing_can_be_said_of_one_video():
    p, t, g = videos(1)
    assert interval(p, t, g) is None
    assert interval(*videos(5), rounds=0) is None
    target = t.copy()
    target[:] = np.nan
    assert interval(p, target, g) is None
    p[0, 0] = np.nan
    with pytest.raises(UserError):
        interval(p, t, g)


def test_constant_predictions_and_labels_give_zero():
    groups = np.repeat(["a", "b", "c"], 5)
    got = interval(np.full((15, 2), 0.1), np.full((15, 2), 0.1), groups)
    assert got["average"] == (0.0, 0.0)


def test_thousand_rounds_over_the_whole_dataset_are_quick():
    rng = np.random.default_rng(0)
    target = rng.uniform(-1, 1, (400_000, 2))
    groups = np.repeat(np.arange(400), 1000)
    sums_ready = time.perf_counter()
    assert interval(0.5 * target, target, groups) is not None
    assert time.perf_counter() - sums_ready < 10  # about 0.4 s alone on one core
