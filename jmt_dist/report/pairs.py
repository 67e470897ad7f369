"""Is one system better than another? Both scored on the same resampled videos (paired bootstrap), corrected for how many are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jmt_dist.errors import UserError
from jmt_dist.evaluate.bootstrap import Difference, paired
from jmt_dist.evaluate.metric import Float
from jmt_dist.evaluate.predict import UnitPrediction, read_predictions
from jmt_dist.evaluate.smooth import smooth
from jmt_dist.evaluate.stored import unit_video
from jmt_dist.evaluate.windows import Choice
from jmt_dist.report.tables import Table
from jmt_dist.track.compare import FOLDS, RunResult

ROUNDS = 5000
LEVEL = 0.05

Seeds = list[dict[str, UnitPrediction]]


@dataclass(frozen=True)
class Rank:
    """A system, its score on the common fold (valence, arousal, average: mean over seeds), and what it lacks to the best one.

    `p`: two-sided, by bootstrap; `adjusted`: after Holm's correction for all comparisons with the best. None: nothing can be said.
    """

    name: str
    score: tuple[float, float, float]
    behind: Difference | None = None
    p: float | None = None
    adjusted: float | None = None


def common_fold(runs: Sequence[RunResult]) -> str | None:
    """The first fold of which all runs have a score and predictions."""
    for index, fold in enumerate(FOLDS):
        if all(run.folds[index].score is not None and run.predictions(fold, run.folds[index].model or run.model) for run in runs):
            return fold
    return None


def rank_runs(runs: Sequence[RunResult], fold: str, rounds: int = ROUNDS) -> list[Rank]:
    """Runs, which all have a score on `fold` (`common_fold`), by its average, best first, each compared with the best.

    Raises UserError where their predictions are not of the same units and labels: other shards or another division into folds.
    """
    index = FOLDS.index(fold)
    seeds = [[read_predictions(file) for file in run.predictions(fold, run.folds[index].model or run.model)] for run in runs]
    scores = [score.values() if (score := run.folds[index].score) is not None else (np.nan,) * 3 for run in runs]
    order = sorted(range(len(runs)), key=lambda i: -scores[i][2])
    best = order[0]
    found = []
    for i in order:
        difference = None if i == best else compare(seeds[best], seeds[i], (runs[best].name, runs[i].name), rounds)
        found.append(Rank(runs[i].name, scores[i], difference, None if difference is None else two_sided(difference, rounds)))
    return adjust(found)


def compare(a: Seeds, b: Seeds, names: tuple[str, str], rounds: int = ROUNDS) -> Difference | None:
    """Score of system a minus score of system b, each the mean over its seeds, on the frames of their units."""
    error = UserError(
        f"{names[0]} and {names[1]} were not scored on the same units and labels", "Compare runs on the same shards and folds."
    )
    if set(a[0]) != set(b[0]):
        raise error
    (va, truth, groups), (vb, other, _) = _joined(a), _joined(b)
    if not np.array_equal(truth, other, equal_nan=True):
        raise error
    return paired(va, vb, truth, groups, rounds)


def smoothing_gain(seeds: Seeds, choice: Choice, rounds: int = ROUNDS) -> tuple[Difference | None, Float]:
    """(smoothed minus raw, smoothed predictions joined [K, N, 2]) of a fold under its chosen filters."""
    va, truth, groups = _joined(seeds)
    smoothed, _, _ = _joined(
        [{n: UnitPrediction(smooth(u.va, choice.valence, choice.arousal), u.labels) for n, u in run.items()} for run in seeds]
    )
    return paired(smoothed, va, truth, groups, rounds), smoothed


def two_sided(difference: Difference, rounds: int) -> float:
    """p of no difference of the averages: twice the smaller tail, and never below what `rounds` resamples can show."""
    tail = difference.not_better["average"]
    return float(min(1.0, max(2 * min(tail, 1 - tail), 2 / rounds)))


def adjust(ranks: Sequence[Rank]) -> list[Rank]:
    """Holm's correction: the smallest of m p-values times m, the next times m - 1, …, never decreasing."""
    asked = sorted((rank.p, i) for i, rank in enumerate(ranks) if rank.p is not None)
    adjusted: dict[int, float] = {}
    highest = 0.0
    for place, (p, i) in enumerate(asked):
        highest = max(highest, min(1.0, p * (len(asked) - place)))
        adjusted[i] = highest
    return [Rank(rank.name, rank.score, rank.behind, rank.p, adjusted.get(i)) for i, rank in enumerate(ranks)]


def ranking_table(ranks: Sequence[Rank], fold: str) -> Table:
    """The ranking as a table; the best and all that are not significantly behind it are bold."""
    rows, bold = [], set()
    for i, rank in enumerate(ranks):
        scores = tuple(f"{value:.3f}" for value in rank.score)
        if i == 0:
            tail: tuple[str, ...] = ("", "", "best")
        elif rank.behind is None or rank.adjusted is None:
            tail = ("", "", "too few videos to say")
        else:
            low, high = rank.behind.interval["average"]
            verdict = "behind" if rank.adjusted < LEVEL else "not told apart"
            tail = (f"−{rank.behind.value['average']:.3f} [{-high:.3f}, {-low:.3f}]", _p(rank.adjusted), verdict)
        if tail[-1] in ("best", "not told apart"):
            bold.add((i, 3 + 1))
        rows.append((str(i + 1), rank.name, *scores, *tail))
    note = (
        f"Fold {fold}, mean over seeds. Behind the best: difference of the averages with its 95 % interval, both systems scored on the "
        f"same {ROUNDS:,} resamples of the videos; p two-sided, after Holm's correction for {max(0, len(ranks) - 1)} comparisons. "
        f"Bold: the best, and what cannot be told apart from it at {LEVEL:.0%}."
    )
    columns = ("rank", "run", "valence", "arousal", "average", "behind the best", "p", "verdict")
    return Table(f"Ranking on fold {fold}", columns, tuple(rows), frozenset(bold), note)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _joined(seeds: Seeds) -> tuple[Float, Float, np.ndarray]:
    """(predictions [K, N, 2], labels [N, 2], videos [N]) over the units in the order of the first seed's names."""
    names = sorted(seeds[0])
    va = np.stack([np.concatenate([run[name].va for name in names]) for run in seeds]).astype(np.float64)
    truth = np.concatenate([seeds[0][name].labels for name in names]).astype(np.float64)
    return va, truth, np.concatenate([np.full(len(seeds[0][name].va), unit_video(name)) for name in names])
