"""95 % intervals by resampling videos, not frames: neighbouring frames are no independent observations (DESIGN section 9).

A video enters as its count and sums, from which the CCC of any resample follows by one matrix product:
1,000 rounds over 594 videos take milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jmt_dist.evaluate.metric import Float, valid_frames

TARGETS = ("valence", "arousal", "average")
LEVEL = (2.5, 97.5)
Interval = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Difference:
    """Score of A minus score of B: point value, 95 % interval, and the shares of resamples in which A is not better, not worse.

    Resamples without a difference are in both shares: of two equal systems each is 1.
    """

    value: dict[str, float]
    interval: Interval
    not_better: dict[str, float]
    not_worse: dict[str, float]


def interval(
    prediction: ArrayLike, target: ArrayLike, groups: Sequence[str] | NDArray[np.str_], rounds: int = 1000, seed: int = 0
) -> Interval | None:
    """95 % interval of the CCC of valence, arousal and their average.

    `prediction` is [N, 2], or [K, N, 2] for K seeds whose scores are averaged; `target` [N, 2], NaN = no label;
    `groups` [N] names the video of each frame. None where nothing can be said: 0 rounds, or fewer than two
    videos with labels. Raises UserError as `metric.valid_frames`.
    """
    sums = video_sums(prediction, target, groups)
    if rounds < 1 or sums.shape[1] < 2:
        return None
    return _quantiles(_resampled(sums, rounds, seed))


def paired(
    a: ArrayLike, b: ArrayLike, target: ArrayLike, groups: Sequence[str] | NDArray[np.str_], rounds: int = 1000, seed: int = 0
) -> Difference | None:
    """Difference of two systems' scores on the same frames, both scored on the same resamples (arguments as `interval`)."""
    sums_a, sums_b = video_sums(a, target, groups), video_sums(b, target, groups)
    if rounds < 1 or sums_a.shape[1] < 2:
        return None
    point = _score(sums_a.sum(axis=1)[:, None]) - _score(sums_b.sum(axis=1)[:, None])
    drawn = _resampled(sums_a, rounds, seed) - _resampled(sums_b, rounds, seed)
    return Difference(
        value={name: float(point[0, i]) for i, name in enumerate(TARGETS)},
        interval=_quantiles(drawn),
        not_better={name: float(np.mean(drawn[:, i] <= 0)) for i, name in enumerate(TARGETS)},
        not_worse={name: float(np.mean(drawn[:, i] >= 0)) for i, name in enumerate(TARGETS)},
    )


def video_sums(prediction: ArrayLike, target: ArrayLike, groups: Sequence[str] | NDArray[np.str_], center: float | None = None) -> Float:
    """Sufficient statistics [K, videos, 2 targets, 6]: n, Σx, Σy, Σx², Σy², Σxy of each video that has labels, videos by name.

    x and y are both shifted by `center`, by default the labels' mean, which leaves every CCC as it is and keeps the sums
    small. Sums that are to be added to those of other calls need one `center` for all.
    """
    stacked = np.asarray(prediction, np.float64)
    stacked = stacked[None] if stacked.ndim == 2 else stacked
    names = np.asarray(groups)
    if names.shape != stacked.shape[1:2]:
        raise ValueError(f"{names.shape} group names for predictions {stacked.shape}")
    parts = []
    for one in stacked:
        p, t, valid = valid_frames(one, target)
        p, t = p[valid], t[valid]
        shift = center if center is not None else t.mean(axis=0) if len(t) else np.zeros(2)
        x, y = p - shift, t - shift
        members, index = np.unique(names[valid], return_inverse=True)
        moments = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1).reshape(len(x), 12)
        sums = np.stack([np.bincount(index, moments[:, i], len(members)) for i in range(12)], axis=-1)
        parts.append(sums.reshape(len(members), 2, 6))
    return np.stack(parts)


def ccc_of_sums(sums: Float) -> Float:
    """CCC [3] (valence, arousal, average) from sums [K, 2, 6], averaged over K."""
    return _score(sums[:, None])[0]


def _score(sums: Float) -> Float:
    """CCC [rounds, 3] (valence, arousal, average) from sums [K, rounds, 2, 6], averaged over K."""
    n, sx, sy, sxx, syy, sxy = np.moveaxis(sums, -1, 0)
    mx, my = sx / n, sy / n
    vx, vy, cov = sxx / n - mx * mx, syy / n - my * my, sxy / n - mx * my
    constant = (vx < 1e-14) & (vy < 1e-14)  # rounding of the sums, for values in [-1, 1]
    below = np.where(constant, 1.0, vx + vy + (mx - my) ** 2)
    each = np.where(constant, 0.0, 2 * cov / below).mean(axis=0)
    return np.concatenate([each, each.mean(axis=-1, keepdims=True)], axis=-1)


def _resampled(sums: Float, rounds: int, seed: int) -> Float:
    videos = sums.shape[1]
    times = np.random.default_rng(seed).multinomial(videos, np.full(videos, 1 / videos), size=rounds).astype(np.float64)
    return _score(np.einsum("rv,kvtm->krtm", times, sums, optimize=True))


def _quantiles(drawn: Float) -> Interval:
    low, high = np.percentile(drawn, LEVEL, axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(TARGETS)}
