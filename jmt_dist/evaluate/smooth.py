"""Smoothing of a unit's predictions that leaves its ends alone (arousal wants a longer window than valence)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jmt_dist.config import Smoother

KINDS: tuple[Smoother, ...] = ("box", "hamming", "savgol")
ORDER = 2  # of the polynomials of Savitzky and Golay: with 0 or 1 the inner part would be the box


@dataclass(frozen=True)
class Filter:
    """A smoothing window: its kind, and its width in frames; 1 = none."""

    kind: Smoother = "box"
    window: int = 1

    def __str__(self) -> str:
        """Such as `hamming 25`, or `none`."""
        return f"{self.kind} {self.window}" if self.window > 1 else "none"


NONE = Filter()


def filtered(x: ArrayLike, how: Filter) -> NDArray[np.float64]:
    """x [N] or [N, K] smoothed along its first axis; constants and ramps come out unchanged, at their ends too."""
    return {"box": box, "hamming": hamming, "savgol": savgol}[how.kind](x, how.window)


def box(x: ArrayLike, window: int) -> NDArray[np.float64]:
    """Centred mean over `window` frames of x [N] or [N, K], along the first axis.

    Near an end the window shrinks symmetrically, to the frames it has on both sides, so that constants *and* ramps
    come out unchanged. (Zero padding, as in published code, halves the first value; a one-sided window drags a
    rising curve's end down.) An even window gives its two outermost frames half weight, so that it stays centred.
    """
    values, half = _prepared(x, window)
    rows = len(values)
    if half == 0 or rows < 3:
        return values.copy()
    total = np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values - values[0], axis=0)])  # shifted: keeps constants exact
    index = np.arange(rows)
    reach = np.minimum(half, np.minimum(index, rows - 1 - index))
    column = (rows, *[1] * (values.ndim - 1))
    sums = total[index + reach + 1] - total[index - reach]
    weight = 2.0 * reach + 1
    if window % 2 == 0:
        full = index[reach == half]
        sums[full] -= (values[full - half] + values[full + half]) / 2 - values[0]
        weight[full] -= 1
    return np.asarray(sums / weight.reshape(column) + values[0])


def hamming(x: ArrayLike, window: int) -> NDArray[np.float64]:
    """Centred mean of x [N] or [N, K] with Hamming weights; near an end the whole window shrinks as in `box`. Even counts as one more."""
    values, half = _prepared(x, window)
    rows = len(values)
    if half == 0 or rows < 3:
        return values.copy()
    found = values.copy()
    half = min(half, (rows - 1) // 2)
    for near in range(1, half):  # the window that frame `near` from an end has room for
        weights = _weights(near)
        found[near] = np.tensordot(weights, values[: 2 * near + 1], 1)
        found[rows - 1 - near] = np.tensordot(weights, values[rows - 1 - 2 * near :], 1)
    weights, flat = _weights(half), values.reshape(rows, -1)
    inner = np.stack([np.convolve(column, weights, "valid") for column in flat.T], axis=1)
    found[half : rows - half] = inner.reshape(-1, *values.shape[1:])
    return found


def savgol(x: ArrayLike, window: int) -> NDArray[np.float64]:
    """Savitzky and Golay's filter of order 2 on x [N] or [N, K]; the ends are read off the parabola of the first or last whole window.

    Even counts as one more; a unit shorter than the window gets the longest odd window it has room for, and one of fewer
    than five frames is left as it is.
    """
    from scipy.signal import savgol_filter

    values, half = _prepared(x, window)
    rows = len(values)
    width = min(2 * half + 1, rows if rows % 2 else rows - 1)
    if width < ORDER + 3:  # three points lie on a parabola exactly: nothing to smooth
        return values.copy()
    return np.asarray(savgol_filter(values, width, ORDER, axis=0, mode="interp"))


def smooth(va: ArrayLike, valence: Filter | int, arousal: Filter | int) -> NDArray[np.float32]:
    """Predictions [rows, 2] of one unit with a filter for each target; a number is a box of so many frames, 1 = none."""
    values = np.asarray(va)
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"{values.shape} is not [rows, 2]")
    filters = [Filter("box", how) if isinstance(how, int) else how for how in (valence, arousal)]
    return np.stack([filtered(values[:, k], how) for k, how in enumerate(filters)], axis=1).astype(np.float32)


def _prepared(x: ArrayLike, window: int) -> tuple[NDArray[np.float64], int]:
    if window < 1:
        raise ValueError(f"a window of {window} frames")
    return np.asarray(x, np.float64), window // 2


def _weights(half: int) -> NDArray[np.float64]:
    weights = np.hamming(2 * half + 1)
    return weights / weights.sum()
