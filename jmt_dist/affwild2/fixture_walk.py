"""What the people of the fixture feel, what face and voice show of it, and how well it can be read at best.

Per unit, valence and arousal are smooth stationary walks, uniform over [-1, 1]. A *cue* is what a
modality shows: the walk plus slow noise. The noise has the walk's own autocorrelation, so that
averaging over time does not lift the ceiling, and each modality draws nothing but its two cues.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.special import ndtr, ndtri

Array = NDArray[np.float64]

GRID = 30.0  # points per second on which walks are drawn
SMOOTH = 0.9  # seconds; the autocorrelation exp(-t^2 / 4 SMOOTH^2) halves after 1.5 s
BETWEEN = 0.10  # share of a walk's variance that differs between units rather than within them
SPAN = 8.0  # seconds, at least, over which a unit's walk is brought to mean 0 and variance 1
SHARED = 0.8  # correlation of the walks of two people in one video, who share one sound track
STRONG, WEAK = 0.88, 0.33  # correlation of a modality's main and side cue with what it shows
STRONG_LIMIT, WEAK_LIMIT = 1.7, 2.2  # largest values that are drawn; the side cue is in standard deviations
_SPREAD = 1.0 / 3.0  # variance of a uniform value in [-1, 1]


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """An own random stream for whatever is named, the same for any number of workers and any order of work."""
    return np.random.default_rng([seed, *(crc32(os.fsencode(str(name))) for name in names)])


def _noise_for(correlation: float) -> float:
    return float(np.sqrt(_SPREAD * (1 - correlation**2) / correlation**2))


_STRONG_NOISE, _WEAK_NOISE = _noise_for(STRONG), _noise_for(WEAK)
_WEAK_SCALE = float(np.sqrt(_SPREAD)) / WEAK  # standard deviation of a side cue


def drift(rng: np.random.Generator, times: Array, seconds: float) -> Array:
    """A smooth stationary Gaussian process of variance 1 at `times` [N] (seconds, from 0)."""
    sigma = seconds * GRID
    margin = int(4 * sigma) + 1
    points = int(np.ceil(times[-1] * GRID)) + 2
    white = rng.standard_normal(points + 2 * margin)
    smooth = gaussian_filter1d(white, sigma, mode="constant", truncate=4.0)[margin : margin + points]
    return np.interp(times, np.arange(points) / GRID, smooth * np.sqrt(2 * np.sqrt(np.pi) * sigma))


def _balanced(rng: np.random.Generator, times: Array) -> Array:
    """A walk of mean 0 and variance 1 over the unit, or over SPAN where that is longer.

    Left to chance, a third of the variance of 8 s would lie between units, and a network that learns
    whose face it sees would do well without looking at the expression.
    """
    span = np.arange(0, max(times[-1], SPAN), 1 / GRID)
    walk = drift(rng, span, SMOOTH)
    return np.interp(times, span, (walk - walk.mean()) / walk.std())


def _level(seed: int, index: int, dimension: int) -> float:
    """The unit's own level of a walk, spread evenly over the units (Kronecker sequence in six dimensions)."""
    golden = 1.0873793783  # positive root of x^7 = x + 1
    shift = stream(seed, "levels", dimension).random()
    return float(ndtri(0.02 + 0.96 * ((shift + (index + 1) * golden ** -(dimension + 1)) % 1.0)))


@dataclass(frozen=True)
class Cues:
    """One unit's walks and cues, one value per label row. `face` and `voice` are (valence cue, arousal cue) [N, 2]."""

    valence: Array
    arousal: Array
    face: Array
    voice: Array


def unit_cues(seed: int, name: str, index: int, times: Array, speaker: tuple[str, int] | None = None) -> Cues:
    """Walks and cues of unit `name` at its rows' `times` [N].

    `speaker` (name, index) is the unit whose voice is heard where two people share a video: the walks
    then have correlation SHARED with the speaker's, and the voice cues are the speaker's.
    """

    def process(owner: tuple[str, int], what: str, dimension: int) -> Array:
        walk = _balanced(stream(seed, owner[0], what), times)
        return np.sqrt(BETWEEN) * _level(seed, owner[1], dimension) + np.sqrt(1 - BETWEEN) * walk

    me = (name, index)
    heard = speaker or me
    feelings = {}
    for dimension, what in enumerate(("valence", "arousal")):
        own = process(me, what, dimension)
        if speaker is not None:
            own = SHARED * process(speaker, what, dimension) + np.sqrt(1 - SHARED**2) * own
        feelings[what] = 2 * ndtr(own) - 1
    said = feelings if speaker is None else {w: 2 * ndtr(process(speaker, w, d)) - 1 for d, w in enumerate(("valence", "arousal"))}

    def strong(value: Array, owner: tuple[str, int], what: str, dimension: int) -> Array:
        return np.clip(value + _STRONG_NOISE * process(owner, what, dimension), -STRONG_LIMIT, STRONG_LIMIT)

    def weak(value: Array, owner: tuple[str, int], what: str, dimension: int) -> Array:
        return np.clip((value + _WEAK_NOISE * process(owner, what, dimension)) / _WEAK_SCALE, -WEAK_LIMIT, WEAK_LIMIT)

    face = [strong(feelings["valence"], me, "face-valence", 2), weak(feelings["arousal"], me, "face-arousal", 3)]
    voice = [weak(said["valence"], heard, "voice-valence", 4), strong(said["arousal"], heard, "voice-arousal", 5)]
    return Cues(feelings["valence"], feelings["arousal"], np.stack(face, 1), np.stack(voice, 1))


@dataclass(frozen=True)
class Rows:
    """Labels and cues of labelled rows: `labels` [N, 2] (NaN none), `face` and `voice` [N, 2], 0 where nothing is shown."""

    labels: Array
    face: Array
    voice: Array


def multiple_correlation(cues: Array, target: Array) -> float:
    """Correlation of the least-squares prediction of `target` [N] from `cues` [N, K] with the target.

    This is the highest CCC a linear map of the cues can reach on these rows: for a prediction of standard
    deviation s_p, CCC <= 2 r s_p s_y / (s_p^2 + s_y^2) <= r, with equality where mean and variance are the target's.
    """
    X = cues - cues.mean(0)
    y = target - target.mean()
    fit = X @ np.linalg.lstsq(X, y, rcond=None)[0]
    return float(np.sqrt(max(0.0, (fit @ fit) / (y @ y))))


def ceilings(units: Sequence[Rows]) -> Mapping[str, Mapping[str, float]]:
    """Oracle CCC over all valid rows of `units`, for visual, audio and both: valence, arousal and their average."""
    labels = np.concatenate([u.labels for u in units])
    valid = ~np.isnan(labels).any(1)
    face, voice = (np.concatenate([getattr(u, part) for u in units])[valid] for part in ("face", "voice"))
    result: dict[str, dict[str, float]] = {}
    for modality, cues in (("visual", face), ("audio", voice), ("both", np.hstack([face, voice]))):
        v, a = (multiple_correlation(cues, labels[valid, k]) for k in range(2))
        result[modality] = {"valence": round(v, 4), "arousal": round(a, 4), "average": round((v + a) / 2, 4)}
    return result
