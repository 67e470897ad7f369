"""One prediction out of several systems' (seeds, folds, recipes): their mean, or the mean after centring by CCC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jmt_dist.errors import UserError
from jmt_dist.evaluate.metric import ccc
from jmt_dist.evaluate.predict import UnitPrediction

How = Literal["mean", "centred"]
Run = Mapping[str, UnitPrediction]


def combine(runs: Sequence[Run], how: How = "mean") -> dict[str, UnitPrediction]:
    """One prediction for every frame of the units that all `runs` hold, clipped to [-1, 1]; labels are the first run's.

    `mean`: the plain mean. `centred`: each system's predictions are first brought to a common mean and spread
    (`centred`), so that none pulls the result by an offset or by a scale of its own.
    Raises UserError: no run, or runs that do not hold the same units and rows.
    """
    if not runs:
        raise UserError("there are no predictions to combine", "Name a run folder that has some.")
    first = runs[0]
    for run in runs[1:]:
        odd = sorted(set(run) ^ set(first)) or sorted(n for n in first if run[n].va.shape != first[n].va.shape)
        if odd:
            raise UserError(f"the predictions differ in unit {odd[0]}", "Combine predictions of the same part of the same shards.")
    stacked = np.stack([np.concatenate([run[name].va for name in first]) for run in runs]).astype(np.float64)
    if how == "centred":
        stacked = np.stack([centred(stacked[..., k]) for k in range(2)], axis=-1)
    fused = np.clip(stacked.mean(axis=0), -1, 1).astype(np.float32)
    parts = np.split(fused, np.cumsum([len(one.va) for one in first.values()])[:-1])
    return {name: UnitPrediction(part, one.labels) for (name, one), part in zip(first.items(), parts, strict=True)}


def centred(systems: NDArray[np.float64]) -> NDArray[np.float64]:
    """Predictions [K, N] of one target by K systems, each shifted and scaled to the mean and deviation that they agree on.

    A system's weight is its mean CCC with the others (none below 0; all equal where no two agree); the common mean and
    deviation are the weighted means of the systems' own. A constant system is only shifted. So published ensembles treat
    annotators and folds (CCC centring; Zhang et al., ABAW 2021 and 2022), there trial by trial; here over all frames, as
    the metric.
    """
    count = len(systems)
    means, deviations = systems.mean(axis=1), systems.std(axis=1)
    others = [[ccc(systems[i], systems[j]) for j in range(count) if j != i] for i in range(count)]
    weights = np.array([max(0.0, float(np.mean(row))) if row else 1.0 for row in others])
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(count, 1 / count)
    mean, deviation = float(weights @ means), float(weights @ deviations)
    varied = deviations > 1e-12
    scale = np.where(varied, deviation / np.where(varied, deviations, 1.0), 1.0)
    return (systems - means[:, None]) * scale[:, None] + mean
