import numpy as np
import pytest

from jmt_dist.errors import UserError
from jmt_dist.evaluate.ensemble import centred, combine
from jmt_dist.evaluate.metric import scores
from jmt_dist.evaluate.predict import UnitPrediction

NAN = np.full((2, 2), np.nan, np.float32)


def lin(x, y):
    """Lin's coefficient by NumPy's own covariance matrix: shares nothing with the package."""
    c = np.cov(x, y, bias=True)
    return 2 * c[0, 1] / (c[0, 0] + c[1, 1] + (np.mean(x) - np.mean(y)) ** 2)


def test_mean_of_runs_is_clipped():
    a = {"u": UnitPrediction(np.array([[0.0, 1.0], [0.2, 1.4]], np.float32), NAN)}
    b = {"u": UnitPrediction(np.array([[1.0, 0.0], [0.4, 1.2]], np.float32), NAN)}
    np.testing.assert_allclose(combine([a, b])["u"].va, [[0.5, 0.5], [0.3, 1.0]], atol=1e-7)
    np.testing.assert_allclose(combine([a])["u"].va, [[0, 1], [0.2, 1]], atol=1e-7)
    for other, unit in (({**b, "v": b["u"]}, "v"), ({"u": UnitPrediction(b["u"].va[:1], NAN[:1])}, "u")):
        with pytest.raises(UserError, match=f"differ in unit {unit}"):
            combine([a, other])
    with pytest.raises(UserError, match="no predictions"):
        combine([])


def test_centring_brings_all_to_the_weighted_mean_and_deviation():
    rng = np.random.default_rng(0)
    common = rng.normal(0.1, 0.3, 400)
    systems = np.stack([0.5 * common + 0.1, common + rng.normal(0, 0.05, 400), 1.2 * common, -common])
    pairs = np.array([[lin(x, y) for y in systems] for x in systems])
    weights = np.maximum(0, (pairs.sum(axis=1) - 1) / 3)
    assert weights[3] == 0 < min(weights[:3])  # the one that contradicts the others has no say in the mean
    weights /= weights.sum()
    got = centred(systems)
    np.testing.assert_allclose(got.mean(axis=1), [np.dot(weights, systems.mean(axis=1))] * 4, atol=1e-12)
    np.testing.assert_allclose(got.std(axis=1), [np.dot(weights, systems.std(axis=1))] * 4, atol=1e-12)
    np.testing.assert_allclose(np.corrcoef(got[0], systems[0])[0, 1], 1, atol=1e-12)


def test_centring_of_one_of_opposites_and_of_constants():
    x = np.random.default_rng(1).normal(0, 0.2, 50)
    np.testing.assert_allclose(centred(x[None]), x[None], atol=1e-15)
    np.testing.assert_allclose(centred(np.stack([x, -x])).mean(axis=1), 0, atol=1e-12)
    flat = centred(np.stack([x, np.full(50, 0.4)]))
    assert np.isfinite(flat).all() and np.ptp(flat[1]) < 1e-12


def test_centring_undoes_what_spoils_the_plain_mean():
    """Four systems see one signal, one of them three times too large and off by 0.3: their plain mean is, too."""
    rng = np.random.default_rng(2)
    truth = {name: rng.normal(0, 0.15, (300, 2)) for name in ("a", "b")}

    def system(scale, shift, seed, noise=0.03):
        draw = np.random.default_rng(seed)
        return {
            name: UnitPrediction((scale * (va + draw.normal(0, noise, va.shape)) + shift).astype(np.float32), va.astype(np.float32))
            for name, va in truth.items()
        }

    runs = [system(1, 0, 1), system(1, 0.02, 2), system(1.1, 0, 3), system(3, 0.3, 4)]
    labels = np.concatenate(list(truth.values()))
    mean, middle = (scores(np.concatenate([one.va for one in combine(runs, how).values()]), labels).average for how in ("mean", "centred"))
    assert middle > mean + 0.05
    assert list(combine(runs, "centred")) == ["a", "b"]
