"""Walks, cues and ceilings of the fixture, against scikit-learn and against the definitions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from jmt_dist.affwild2.fixture_walk import (
    BETWEEN,
    SHARED,
    SMOOTH,
    SPAN,
    STRONG,
    WEAK,
    Cues,
    Rows,
    ceilings,
    drift,
    multiple_correlation,
    unit_cues,
)

TIMES = np.arange(256) / 30


def ccc(x: np.ndarray, y: np.ndarray) -> float:
    return float(2 * np.mean((x - x.mean()) * (y - y.mean())) / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


@pytest.fixture(scope="module")
def many() -> list[Cues]:
    return [unit_cues(7, f"unit{k}", k, TIMES) for k in range(400)]


def test_drift_has_unit_variance_and_the_gaussian_autocorrelation() -> None:
    rate = 10
    x = drift(np.random.default_rng(0), np.arange(200_000) / rate, SMOOTH)
    assert x.var() == pytest.approx(1, abs=0.04)
    for seconds in (0.5, 1.0, 2.0):
        lag = round(seconds * rate)
        assert np.mean(x[lag:] * x[:-lag]) == pytest.approx(np.exp(-(seconds**2) / (4 * SMOOTH**2)), abs=0.04)


def test_walks_are_smooth_and_fill_the_range(many: list[Cues]) -> None:
    for what in ("valence", "arousal"):
        all_rows = np.stack([getattr(c, what) for c in many])
        assert np.abs(all_rows).max() <= 1
        assert np.abs(np.diff(all_rows, axis=1)).max() < 0.15  # per frame
        # uniform over [-1, 1]: each tenth of the range holds about a tenth of the rows
        share = np.histogram(all_rows, 10, (-1, 1))[0] / all_rows.size
        assert share.min() > 0.06 and share.max() < 0.15
        assert abs(all_rows.mean()) < 0.03


def test_units_differ_in_level_but_mostly_within_themselves(many: list[Cues]) -> None:
    valence = np.stack([c.valence for c in many])
    between = valence.mean(1).var() / valence.var()
    assert BETWEEN / 2 < between < 2 * BETWEEN
    assert TIMES[-1] > SPAN  # shorter units would vary less


def test_cues_show_what_they_promise_and_nothing_else(many: list[Cues]) -> None:
    v, a = (np.concatenate([getattr(c, what) for c in many]) for what in ("valence", "arousal"))
    face, voice = (np.concatenate([getattr(c, what) for c in many]) for what in ("face", "voice"))
    shown = ((face[:, 0], v, a, STRONG), (voice[:, 1], a, v, STRONG), (face[:, 1], a, v, WEAK), (voice[:, 0], v, a, WEAK))
    for cue, own, other, wanted in shown:
        # 400 units hold about 1,600 independent values: one standard error is 0.023 for the side cues, 0.006 for the main ones
        assert np.corrcoef(cue, own)[0, 1] == pytest.approx(wanted, abs=0.02 if wanted == STRONG else 0.07)
        assert abs(np.corrcoef(cue, other)[0, 1]) < 0.08
    noise = np.corrcoef([face[:, 0] - v, face[:, 1] - a, voice[:, 0] - v, voice[:, 1] - a])
    assert abs(noise[0, 3]) < 0.08 and abs(noise[0, 1]) < 0.08


def test_the_noise_is_as_slow_as_the_walk(many: list[Cues]) -> None:
    def correlation(x: np.ndarray, lag: int) -> float:
        return float(np.mean(x[:, lag:] * x[:, :-lag]) / np.mean(x * x))

    valence = np.stack([c.valence for c in many])
    noise = np.stack([c.face[:, 0] for c in many]) - valence
    for lag in (15, 30, 60):
        assert correlation(noise, lag) == pytest.approx(correlation(valence, lag), abs=0.08)


def test_the_listener_hears_the_speaker() -> None:
    pairs = [(unit_cues(3, f"l{k}", 2 * k, TIMES), unit_cues(3, f"r{k}", 2 * k + 1, TIMES, (f"l{k}", 2 * k))) for k in range(100)]
    assert all(np.array_equal(left.voice, right.voice) for left, right in pairs)
    assert not np.array_equal(pairs[0][0].face, pairs[0][1].face)
    left, right = (np.concatenate([p[k].arousal for p in pairs]) for k in range(2))
    assert np.corrcoef(left, right)[0, 1] == pytest.approx(SHARED, abs=0.06)


def test_a_unit_does_not_depend_on_the_others() -> None:
    assert np.array_equal(unit_cues(0, "a", 1, TIMES).face, unit_cues(0, "a", 1, TIMES).face)
    assert not np.array_equal(unit_cues(0, "a", 1, TIMES).valence, unit_cues(1, "a", 1, TIMES).valence)
    assert not np.array_equal(unit_cues(0, "a", 1, TIMES).valence, unit_cues(0, "b", 1, TIMES).valence)


def test_ceilings_equal_an_independent_oracle(many: list[Cues]) -> None:
    units = [Rows(np.stack([c.valence, c.arousal], 1), c.face, c.voice) for c in many[:30]]
    units[4].labels[10:60] = np.nan
    found = ceilings(units)
    labels = np.concatenate([u.labels for u in units])
    valid = ~np.isnan(labels[:, 0])
    cues = {"visual": np.concatenate([u.face for u in units]), "audio": np.concatenate([u.voice for u in units])}
    cues["both"] = np.hstack([cues["visual"], cues["audio"]])
    for modality, X in cues.items():
        scores = []
        for k, what in enumerate(("valence", "arousal")):
            y = labels[valid, k]
            p = LinearRegression().fit(X[valid], y).predict(X[valid])
            p = y.mean() + (p - p.mean()) * y.std() / p.std()  # the variance that CCC rewards most
            scores.append(ccc(p, y))
            assert found[modality][what] == pytest.approx(scores[-1], abs=1e-4)
        assert found[modality]["average"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert found["both"]["average"] > max(found["visual"]["average"], found["audio"]["average"]) + 0.1


def test_no_other_linear_map_reaches_a_higher_ccc(many: list[Cues]) -> None:
    rng = np.random.default_rng(0)
    X, y = many[0].face, many[0].valence
    best = max(ccc(X @ w + b, y) for w, b in zip(rng.normal(0, 1, (4000, 2)), rng.normal(0, 0.5, 4000), strict=True))
    ceiling = multiple_correlation(X, y)
    assert best <= ceiling + 1e-9
    assert best > ceiling - 0.1  # the search came near: the bound is not an empty one
