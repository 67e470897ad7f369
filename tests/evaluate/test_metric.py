import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, root_mean_squared_error

from jmt_dist.errors import UserError
from jmt_dist.evaluate.metric import ccc, pearson, rmse, scores, sign_agreement, unit_scores


def exact_ccc(x, y):
    """Lin's formula in exact rational arithmetic: shares nothing with NumPy."""
    x, y = [Fraction(float(v)) for v in x], [Fraction(float(v)) for v in y]
    n = len(x)
    mx, my = sum(x) / n, sum(y) / n
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / n
    vx, vy = sum((a - mx) ** 2 for a in x) / n, sum((b - my) ** 2 for b in y) / n
    return float(2 * cov / (vx + vy + (mx - my) ** 2))


@pytest.mark.parametrize("seed", range(20))
def test_ccc_equals_exact_arithmetic(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 400))
    y = rng.uniform(-1, 1, n)
    x = rng.uniform(-1, 1) * y + rng.normal(0, 0.3, n) + rng.uniform(-0.5, 0.5)
    assert ccc(x, y) == pytest.approx(exact_ccc(x, y), abs=1e-13)
    assert pearson(x, y) == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
    assert rmse(x, y) == pytest.approx(root_mean_squared_error(y, x), abs=1e-13)


def test_ccc_known_values():
    y = np.array([1.0, 2.0, 3.0, 4.0])
    assert ccc(y, y) == 1.0
    assert ccc(-y, y) < 0
    # population moments: cov 1.25, vars 1.25, mean difference 1 -> 2.5 / 3.5 (sample moments would give 0.7692)
    assert ccc(y + 1, y) == pytest.approx(2.5 / 3.5, abs=1e-15)
    # 2 * cov, not 2 * rho^2: halving the predictions
    assert ccc(y / 2, y) == pytest.approx(2 * 0.625 / (0.3125 + 1.25 + 1.25**2), abs=1e-15)


def test_ccc_is_float64_inside():
    rng = np.random.default_rng(0)
    y = rng.normal(0, 1e-3, 20_000).astype(np.float32) + np.float32(0.9)  # a mean far above the spread: float32 sums lose it
    x = y + rng.normal(0, 1e-3, 20_000).astype(np.float32)
    assert ccc(x, y) == pytest.approx(exact_ccc(x, y), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.7])
def test_both_constant_is_zero(value):
    x = np.full(7, value)  # the mean of seven 0.1 is not 0.1: a naive formula returns 1 or 0.5 here
    assert ccc(x, x) == 0.0
    assert ccc(x, x + 0.5) == 0.0
    assert pearson(x, np.arange(7.0)) == 0.0
    assert ccc(x, np.arange(7.0)) == 0.0


def test_masked_and_unlabelled_frames_do_not_count():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=50), rng.normal(size=50)
    mask = rng.random(50) < 0.6
    hidden = y.copy()
    hidden[~mask] = np.nan
    expected = exact_ccc(x[mask], y[mask])
    assert ccc(x, y, mask) == pytest.approx(expected, abs=1e-13)
    assert ccc(x, hidden) == pytest.approx(expected, abs=1e-13)
    assert abs(ccc(x, np.nan_to_num(hidden)) - expected) > 1e-3  # what counting them as zero would give


def test_too_few_frames_are_no_score():
    assert math.isnan(ccc([0.1], [0.1]))
    assert math.isnan(ccc([0.1, 0.2], [np.nan, 0.1]))
    with pytest.raises(UserError, match="1 labelled frames"):
        scores(np.zeros((2, 2)), np.array([[0.1, 0.2], [np.nan, np.nan]]))


def test_scores_per_target():
    rng = np.random.default_rng(2)
    target = rng.uniform(-1, 1, (300, 2))
    prediction = 0.7 * target + rng.normal(0, [0.1, 0.4], (300, 2))
    target[::7] = np.nan
    ok = np.isfinite(target[:, 0])
    got = scores(prediction.astype(np.float64), target)
    v, a = (exact_ccc(prediction[ok, k], target[ok, k]) for k in range(2))
    assert (got.valence, got.arousal) == pytest.approx((v, a), abs=1e-13)
    assert got.average == pytest.approx((v + a) / 2, abs=1e-13)
    assert got.frames == ok.sum() == got.to_dict()["frames"]
    assert got.rmse_arousal == pytest.approx(root_mean_squared_error(target[ok, 1], prediction[ok, 1]), abs=1e-13)
    assert got.pearson_valence == pytest.approx(pearsonr(prediction[ok, 0], target[ok, 0]).statistic, abs=1e-12)


def test_nan_prediction_is_an_error_only_where_a_label_is():
    target = np.array([[0.1, 0.2], [0.3, 0.1], [np.nan, np.nan]])
    prediction = np.array([[0.1, 0.1], [0.2, 0.3], [np.nan, 0.0]])
    assert scores(prediction, target).frames == 2
    prediction[1, 1] = np.inf
    with pytest.raises(UserError, match="1 of 2 labelled frames have no finite prediction"):
        scores(prediction, target)
    with pytest.raises(UserError, match="not both"):
        scores(prediction[:2], target)


def test_sign_agreement_is_the_accuracy_of_signs():
    rng = np.random.default_rng(5)
    target = np.round(rng.uniform(-1, 1, 500), 1)  # some labels are exactly 0
    prediction = np.round(target + rng.normal(0, 0.4, 500), 1)
    target[::6] = np.nan
    ok = np.isfinite(target)
    expected = accuracy_score(np.sign(target[ok]), np.sign(prediction[ok]))
    assert 0.3 < expected < 1 and sign_agreement(prediction, target) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(sign_agreement([0.1], [np.nan])) and math.isnan(sign_agreement([np.nan], [0.1]))


def test_scores_of_each_unit():
    rng = np.random.default_rng(6)
    labels = {name: rng.uniform(-1, 1, (50, 2)) for name in ("a", "b", "bare")}
    labels["bare"][1:] = np.nan
    predictions = {name: rng.uniform(-1, 1, (50, 2)) for name in labels}
    got = unit_scores(predictions, labels)
    assert got["bare"] is None and got["a"] == scores(predictions["a"], labels["a"])
    assert got["b"].valence == pytest.approx(exact_ccc(predictions["b"][:, 0], labels["b"][:, 0]), abs=1e-13)
    assert got["b"].sign_arousal == accuracy_score(np.sign(labels["b"][:, 1]), np.sign(predictions["b"][:, 1]))
