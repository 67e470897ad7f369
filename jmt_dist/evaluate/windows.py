"""Which smoothing a fold uses: chosen on its training units alone, from what the other folds' models say of them (DESIGN section 9).

A fold's own model has seen its training units, so its predictions of them say nothing. But the model of another fold
that held a unit out does: over all such units that are no video of this fold's validation set, the filter of each target
with the highest CCC is taken. No label of a unit that is scored takes part in the choice of its filter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jmt_dist.evaluate.bootstrap import ccc_of_sums, video_sums
from jmt_dist.evaluate.metric import Float
from jmt_dist.evaluate.predict import UnitPrediction
from jmt_dist.evaluate.smooth import KINDS, NONE, Filter, filtered

WINDOWS = (5, 9, 15, 25, 41, 61, 101, 151, 201)  # frames; beyond 200 everything published is over-smoothed
CANDIDATES: tuple[Filter, ...] = (NONE, *(Filter(kind, window) for window in WINDOWS for kind in KINDS))

Run = Mapping[str, UnitPrediction]


@dataclass(frozen=True)
class Choice:
    """The filters of valence and arousal for a fold, on what they were chosen, and the CCC there without and with them."""

    valence: Filter
    arousal: Filter
    folds: tuple[str, ...]
    videos: int
    raw: tuple[float, float]
    smoothed: tuple[float, float]

    @property
    def smooths(self) -> bool:
        """Whether any target is smoothed."""
        return max(self.valence.window, self.arousal.window) > 1


class OutOfFold:
    """What every fold's models (one per seed) say of its validation units, under every candidate filter.

    `runs`: {fold: [{unit: prediction} per seed]}; all folds have the same number of seeds. `video` names a unit's video.
    Each unit is smoothed once per candidate; after that any choice is a sum over videos.
    """

    def __init__(self, runs: Mapping[str, Sequence[Run]], video: Callable[[str], str], candidates: Sequence[Filter] = CANDIDATES) -> None:
        self.runs, self.video, self.candidates = runs, video, tuple(candidates)

    @cached_property
    def _sums(self) -> dict[str, tuple[tuple[str, ...], Float]]:
        """{fold: (its videos with labels, sums [candidates, seeds, videos, 2, 6])}."""
        return {fold: self._of_fold(runs) for fold, runs in self.runs.items()}

    def _of_fold(self, runs: Sequence[Run]) -> tuple[tuple[str, ...], Float]:
        units = [name for name, one in runs[0].items() if np.isfinite(one.labels).all(axis=1).any()]
        groups = np.array([self.video(name) for name in units for _ in runs[0][name].labels])
        truth = np.concatenate([runs[0][name].labels for name in units])
        labelled = np.isfinite(truth).all(axis=1)
        # sums of different folds are added up, so none may be shifted by a mean of its own

        def joined(how: Filter) -> Float:  # [seeds, frames, 2]
            return np.stack([np.concatenate([filtered(run[name].va, how) for name in units]) for run in runs])

        # sums of different folds are added up, so none may be shifted by a mean of its own
        sums = [video_sums(joined(how), truth, groups, center=0.0) for how in self.candidates]
        return tuple(np.unique(groups[labelled]).tolist()), np.stack(sums)

    def choose(self, fold: str, held_out: Sequence[str] | None = None) -> Choice | None:
        """The filters for `fold`, whose validation videos (or `held_out`) take no part; None where no other unit is left.

        `fold` may be any name: for test units, with nothing held out, all folds count.
        """
        own = set(held_out if held_out is not None else (self.video(name) for name in (self.runs[fold][0] if fold in self.runs else ())))
        parts, folds, videos = [], [], 0
        for name, (members, sums) in self._sums.items():
            keep = [i for i, member in enumerate(members) if member not in own]
            if name != fold and keep:
                parts.append(sums[:, :, keep].sum(axis=2))
                folds.append(name)
                videos += len(keep)
        if not parts:
            return None
        each = np.stack([ccc_of_sums(total) for total in np.sum(parts, axis=0)])[:, :2]  # [candidates, 2]
        best = each.argmax(axis=0)  # of equals the first: the smallest window
        v, a = (self.candidates[int(i)] for i in best)
        raw, smoothed = each[0], each[best, [0, 1]]
        return Choice(v, a, tuple(folds), videos, (float(raw[0]), float(raw[1])), (float(smoothed[0]), float(smoothed[1])))
