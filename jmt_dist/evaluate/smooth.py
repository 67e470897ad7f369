"""Box smoothing of a unit's predictions that leaves its ends alone (arousal wants a longer window than valence)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def box(x: ArrayLike, window: int) -> NDArray[np.float64]:
    """Centred mean over `window` frames of x [N] or [N, K], along the first axis.

    Near an end the window shrinks symmetrically, to the frames it has on both sides, so that constants *and* ramps
    come out unchanged. (Zero padding, as in published code, halves the first value; a one-sided window drags a
    rising curve's end down.) An even window gives its two outermost frames half weight, so that it stays centred.
    """
    if window < 1:
        raise ValueError(f"a window of {window} frames")
    values = np.asarray(x, np.float64)
    rows = len(values)
    half = window // 2
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


def smooth(va: ArrayLike, valence: int, arousal: int) -> NDArray[np.float32]:
    """Predictions [rows, 2] of one unit with a box window in frames for each target; 1 = none."""
    values = np.asarray(va)
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"{values.shape} is not [rows, 2]")
    return np.stack([box(values[:, 0], valence), box(values[:, 1], arousal)], axis=1).astype(np.float32)
