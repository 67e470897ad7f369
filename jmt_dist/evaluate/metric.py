"""The field's yardstick: Lin's concordance correlation coefficient, in float64, over all valid frames (DESIGN section 9).

One CCC per target over the frames of all units together; the score P is the mean of valence and arousal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jmt_dist.errors import UserError

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Agreement of predictions with labels; CCC unless the name says otherwise (`sign_`: share of equal signs).

    `frames` = valid frames counted.
    """

    valence: float
    arousal: float
    average: float
    rmse_valence: float
    rmse_arousal: float
    pearson_valence: float
    pearson_arousal: float
    sign_valence: float
    sign_arousal: float
    frames: int

    def to_dict(self) -> dict[str, float]:
        """Plain numbers for JSON and for tracking."""
        return asdict(self)


def ccc(x: ArrayLike, y: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Lin's CCC of predictions x and labels y, both [N]: 2 cov / (var_x + var_y + (mean_x - mean_y)^2), population moments.

    Counted are the elements where `mask` is true (default: all) and the label is not NaN. Both constant: 0.
    Fewer than two counted elements, or a NaN prediction among them: NaN, never a number that looks like a score.
    """
    a, b = _counted(x, y, mask)
    if len(a) < 2:
        return float("nan")
    if np.ptp(a) == 0 and np.ptp(b) == 0:  # exact: the mean of a constant is off by an ulp, and 0/0 would become 1
        return 0.0
    da, db = a - a.mean(), b - b.mean()
    return float(2 * np.mean(da * db) / (np.mean(da * da) + np.mean(db * db) + (a.mean() - b.mean()) ** 2))


def pearson(x: ArrayLike, y: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Pearson correlation of x and y [N], counted as in `ccc`; 0 where either is constant."""
    a, b = _counted(x, y, mask)
    if len(a) < 2:
        return float("nan")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    da, db = a - a.mean(), b - b.mean()
    return float(np.sum(da * db) / np.sqrt(np.sum(da * da) * np.sum(db * db)))


def rmse(x: ArrayLike, y: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Root mean squared error of x against y [N], counted as in `ccc`; NaN if nothing is counted."""
    a, b = _counted(x, y, mask)
    return float(np.sqrt(np.mean((a - b) ** 2))) if len(a) else float("nan")


def sign_agreement(x: ArrayLike, y: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Share of counted elements whose prediction x has the sign of its label y (SAGR; 0 is a sign of its own); NaN if none."""
    a, b = _counted(x, y, mask)
    if not len(a) or np.isnan(a).any():
        return float("nan")
    return float(np.mean(np.sign(a) == np.sign(b)))


def valid_frames(prediction: ArrayLike, target: ArrayLike) -> tuple[Float, Float, NDArray[np.bool_]]:
    """(prediction [N,2], target [N,2], valid [N]) in float64; a frame is valid when both its labels are numbers.

    Raises UserError where shapes differ or a valid frame has no finite prediction: leaving such frames out would
    reward a model for failing on them.
    """
    p, t = np.asarray(prediction, np.float64), np.asarray(target, np.float64)
    if p.shape != t.shape or p.ndim != 2 or p.shape[1] != 2:
        raise UserError(f"predictions {p.shape} and labels {t.shape} are not both [frames, 2]", "Predict the units that the labels name.")
    valid: NDArray[np.bool_] = np.isfinite(t[:, 0]) & np.isfinite(t[:, 1])
    broken = valid & ~np.isfinite(p).all(axis=1)
    if broken.any():
        raise UserError(
            f"{int(broken.sum())} of {int(valid.sum())} labelled frames have no finite prediction (first: row {int(broken.argmax())})",
            "The model diverged: look at its training curve before scoring it.",
        )
    return p, t, valid


def scores(prediction: ArrayLike, target: ArrayLike) -> Scores:
    """Scores of predictions [N, 2] against labels [N, 2] (valence, arousal; NaN = no label) over all valid frames.

    Raises UserError where fewer than two frames are valid, or as in `valid_frames`.
    """
    p, t, valid = valid_frames(prediction, target)
    if valid.sum() < 2:
        raise UserError(f"{int(valid.sum())} labelled frames cannot be scored", "Score a part of the dataset that has labels.")
    v, a = ccc(p[:, 0], t[:, 0], valid), ccc(p[:, 1], t[:, 1], valid)
    return Scores(
        valence=v,
        arousal=a,
        average=(v + a) / 2,
        rmse_valence=rmse(p[:, 0], t[:, 0], valid),
        rmse_arousal=rmse(p[:, 1], t[:, 1], valid),
        pearson_valence=pearson(p[:, 0], t[:, 0], valid),
        pearson_arousal=pearson(p[:, 1], t[:, 1], valid),
        sign_valence=sign_agreement(p[:, 0], t[:, 0], valid),
        sign_arousal=sign_agreement(p[:, 1], t[:, 1], valid),
        frames=int(valid.sum()),
    )


def unit_scores(predictions: Mapping[str, ArrayLike], labels: Mapping[str, ArrayLike]) -> dict[str, Scores | None]:
    """Scores of each unit by itself, from {unit: [rows, 2]}; None for a unit with fewer than two labelled frames.

    A unit's CCC is unstable where its labels hardly vary: the score of a system is the CCC over all units together.
    """
    found: dict[str, Scores | None] = {}
    for name, va in predictions.items():
        _, truth, valid = valid_frames(va, labels[name])
        found[name] = scores(va, truth) if valid.sum() >= 2 else None
    return found


def _counted(x: ArrayLike, y: ArrayLike, mask: ArrayLike | None) -> tuple[Float, Float]:
    a, b = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape} differ")
    keep = ~np.isnan(b)
    if mask is not None:
        keep &= np.asarray(mask, bool).ravel()
    return a[keep], b[keep]
