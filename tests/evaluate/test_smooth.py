import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import convolve1d

from jmt_dist.evaluate.smooth import box, smooth

windows = st.integers(1, 60)


@given(windows, st.integers(1, 80))
def test_constants_and_ramps_keep_their_ends(window, rows):
    ramp = np.linspace(-0.8, 0.9, rows)
    np.testing.assert_allclose(box(ramp, window), ramp, atol=1e-12)
    np.testing.assert_allclose(box(np.full(rows, 0.3), window), 0.3, atol=1e-12)


@given(windows, st.integers(1, 80), st.integers(0, 5))
def test_matches_direct_definition(window, rows, seed):
    x = np.random.default_rng(seed).uniform(-1, 1, rows)
    half = window // 2
    for i, got in enumerate(box(x, window)):
        reach = min(half, i, rows - 1 - i)
        weights = np.ones(2 * reach + 1)
        if window % 2 == 0 and reach == half:
            weights[[0, -1]] = 0.5
        assert got == pytest.approx(np.average(x[i - reach : i + reach + 1], weights=weights), abs=1e-12)


def test_inner_part_equals_scipy_and_zero_padding_differs():
    x = np.random.default_rng(0).uniform(0.4, 0.6, 200)
    padded = convolve1d(x, np.full(21, 1 / 21), mode="constant")
    got = box(x, 21)
    np.testing.assert_allclose(got[10:-10], padded[10:-10], atol=1e-12)
    assert padded[0] < 0.35 < got[0]  # zero padding halves the ends; this does not


def test_targets_have_their_own_windows():
    va = np.random.default_rng(1).uniform(-1, 1, (90, 2)).astype(np.float32)
    got = smooth(va, 1, 20)
    np.testing.assert_array_equal(got[:, 0], va[:, 0])
    np.testing.assert_allclose(got[:, 1], box(va[:, 1], 20), atol=1e-6)
    assert got.dtype == np.float32
    assert np.std(got[20:70, 1]) < 0.5 * np.std(va[20:70, 1])
    with pytest.raises(ValueError, match="window of 0"):
        box(va[:, 0], 0)
