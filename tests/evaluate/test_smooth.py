import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import convolve1d
from scipy.signal import savgol_coeffs
from scipy.signal.windows import hamming as scipy_hamming

from jmt_dist.evaluate.smooth import KINDS, Filter, box, filtered, hamming, savgol, smooth

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


@given(st.sampled_from(KINDS), windows, st.integers(1, 80))
def test_no_kind_bends_the_ends(kind, window, rows):
    ramp = np.stack([np.linspace(-0.8, 0.9, rows), np.full(rows, 0.3)], axis=1)
    np.testing.assert_allclose(filtered(ramp, Filter(kind, window)), ramp, atol=1e-12)


@pytest.mark.parametrize(("rows", "window"), [(1, 9), (2, 9), (3, 9), (8, 9), (9, 9), (10, 5), (60, 25), (60, 24), (61, 200)])
def test_hamming_matches_its_definition_everywhere(rows, window):
    x = np.random.default_rng(rows).uniform(-1, 1, rows)
    for i, got in enumerate(hamming(x, window)):
        reach = min(window // 2, i, rows - 1 - i)
        assert got == pytest.approx(np.average(x[i - reach : i + reach + 1], weights=scipy_hamming(2 * reach + 1)), abs=1e-12), i


def test_savgol_is_the_least_squares_parabola():
    x = np.random.default_rng(3).uniform(-1, 1, 90)
    got = savgol(x, 15)
    np.testing.assert_allclose(got[7:-7], convolve1d(x, savgol_coeffs(15, 2, use="dot"), mode="constant")[7:-7], atol=1e-12)
    t = np.arange(15)
    np.testing.assert_allclose(got[:8], np.polyval(np.polyfit(t, x[:15], 2), t)[:8], atol=1e-10)  # the ends: the first window's parabola
    np.testing.assert_allclose(got[-8:], np.polyval(np.polyfit(t, x[-15:], 2), t)[-8:], atol=1e-10)
    np.testing.assert_allclose(savgol(x[:9], 15), np.polyval(np.polyfit(t[:9], x[:9], 2), t[:9]), atol=1e-10)  # shorter than the window
    np.testing.assert_array_equal(savgol(x[:4], 15), x[:4])


def test_smooth_takes_a_filter_for_each_target():
    va = np.random.default_rng(1).uniform(-1, 1, (90, 2)).astype(np.float32)
    got = smooth(va, Filter("savgol", 9), Filter("hamming", 21))
    np.testing.assert_allclose(got, np.stack([savgol(va[:, 0], 9), hamming(va[:, 1], 21)], axis=1), atol=1e-6)
    assert [str(how) for how in (Filter("savgol", 9), Filter("hamming"))] == ["savgol 9", "none"]
