"""Is one system better than another? Both scored on the same resampled videos (paired bootstrap), corrected for how many are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jmt_dist.errors import UserError
from jmt_dist.evaluate.bootstrap import Difference, paired
from jmt_dist.evaluate.metric import Float
from jmt_dist.evaluate.predict import UnitPrediction, read_predictions
from jmt_dist.evaluate.smooth import smooth
from jmt_dist.evaluate.stored import unit_video
from jmt_dist.evaluate.windows import Choice
from jmt_dist.report.tables import COSTS, Table, costs, costs_text, csv_text, with_interval
from jmt_dist.track.compare import FOLDS, TARGETS, RunResult, Score

ROUNDS = 5000
LEVEL = 0.05
BEST = "best"
OURS = "jmt"

Seeds = list[dict[str, UnitPrediction]]


@dataclass(frozen=True)
class Rank:
    """A system, its score on the common fold (mean over seeds, interval), size and time, and its distance from the reference.

    `distance`: this system minus the reference, None for the reference itself or where nothing can be said; `p`: two-sided, by
    bootstrap; `adjusted`: after Holm's correction for all comparisons with the reference. `costs`: parameters, ms per 1,000 clips.
    """

    name: str
    score: Score
    distance: Difference | None = None
    p: float | None = None
    adjusted: float | None = None
    reference: bool = False
    costs: tuple[int | None, float | None] = (None, None)


def common_fold(runs: Sequence[RunResult]) -> str | None:
    """The first fold of which all runs have a score and predictions."""
    for index, fold in enumerate(FOLDS):
        if all(run.folds[index].score is not None and run.predictions(fold, run.folds[index].model or run.model) for run in runs):
            return fold
    return None


def reference_of(runs: Sequence[RunResult], wanted: str = "") -> int | None:
    """Place of the run that the others are compared with; None: the best one, whichever that will be.

    `wanted`: `best`, or the name, folder or fusion model of one run. Empty: the run of `jmt` where others have other fusion models,
    else the best. Raises UserError where no run, or more than one, is called so.
    """
    if wanted == BEST:
        return None
    if wanted:
        columns = ([run.name for run in runs], [run.out.name for run in runs], [run.model for run in runs])
        called = [[i for i, name in enumerate(names) if name == wanted] for names in columns]
        one = next((places for places in called if len(places) == 1), None)
        if one is None:
            known = ", ".join(dict.fromkeys([BEST, *(run.name for run in runs)]))
            raise UserError(f"reference={wanted} names {'several runs' if any(called) else 'no run'}", f"There are: {known}.")
        return one[0]
    ours = [i for i, run in enumerate(runs) if run.model == OURS]
    if len(ours) > 1:
        ours = [i for i in ours if OURS in (runs[i].name, runs[i].out.name)]
    return ours[0] if len(ours) == 1 and any(run.model not in (OURS, "") for run in runs) else None


def rank_runs(runs: Sequence[RunResult], fold: str, rounds: int = ROUNDS, reference: int | None = None) -> list[Rank]:
    """Runs, which all have a score on `fold` (`common_fold`), by its average, best first, each compared with one of them.

    `reference`: the place in `runs` of that one, as `reference_of` gives it; None: the best.
    Raises UserError where their predictions are not of the same units and labels: other shards or another division into folds.
    """
    index = FOLDS.index(fold)
    seeds = [[read_predictions(file) for file in run.predictions(fold, run.folds[index].model or run.model)] for run in runs]
    scores = [run.folds[index].score or Score(np.nan, np.nan, np.nan) for run in runs]
    order = sorted(range(len(runs)), key=lambda i: -scores[i].average)
    middle = order[0] if reference is None else reference
    found = []
    for i in order:
        distance = None if i == middle else compare(seeds[i], seeds[middle], (runs[i].name, runs[middle].name), rounds)
        p = None if distance is None else two_sided(distance, rounds)
        found.append(Rank(runs[i].name, scores[i], distance, p, reference=i == middle, costs=costs(runs[i])))
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
    tail = min(difference.not_better["average"], difference.not_worse["average"])
    return float(min(1.0, max(2 * tail, 2 / rounds)))


def adjust(ranks: Sequence[Rank]) -> list[Rank]:
    """Holm's correction: the smallest of m p-values times m, the next times m - 1, …, never decreasing."""
    asked = sorted((rank.p, i) for i, rank in enumerate(ranks) if rank.p is not None)
    adjusted: dict[int, float] = {}
    highest = 0.0
    for place, (p, i) in enumerate(asked):
        highest = max(highest, min(1.0, p * (len(asked) - place)))
        adjusted[i] = highest
    return [replace(rank, adjusted=adjusted.get(i)) for i, rank in enumerate(ranks)]


def verdict(rank: Rank, best: bool) -> str:
    """What the numbers of a row come to, in a word or two; `best`: the reference is the first of the ranking."""
    if rank.reference:
        return "best" if best else "reference"
    if rank.distance is None or rank.adjusted is None:
        return "too few videos to say"
    if rank.adjusted >= LEVEL:
        return "not told apart"
    return "ahead" if rank.distance.value["average"] > 0 else "behind"


def ranking_table(ranks: Sequence[Rank], fold: str) -> Table:
    """The ranking as a table: scores, interval, distance from the reference, size and time; the highest average is bold, and where
    it is the reference, so are all that cannot be told apart from it."""
    rows, bold = [], {(0, 4)}
    against = next(rank.name for rank in ranks if rank.reference)
    best = ranks[0].reference
    for i, rank in enumerate(ranks):
        scores = (f"{rank.score.valence:.3f}", f"{rank.score.arousal:.3f}", with_interval(rank.score, 2))
        said = verdict(rank, best)
        distance, p = "", ""
        if rank.distance is not None and rank.adjusted is not None:
            low, high = rank.distance.interval["average"]
            distance, p = f"{_signed(rank.distance.value['average'])} [{_signed(low)}, {_signed(high)}]", _p(rank.adjusted)
        if best and said == "not told apart":
            bold.add((i, 4))
        rows.append((str(i + 1), rank.name, *scores, distance, p, said, *costs_text(rank.costs)))
    whom = f"the best, {against}" if best else against
    note = (
        f"Fold {fold}, mean over seeds; brackets: 95 % interval by bootstrap over videos. Every run is compared with {whom}: difference "
        f"of the averages with its interval, both systems scored on the same {ROUNDS:,} resamples of the videos; p two-sided, after "
        f"Holm's correction for {max(0, len(ranks) - 1)} comparisons; told apart below {LEVEL:.0%}. "
        f"Bold: the highest average{', and what cannot be told apart from it' if best else ''}."
    )
    columns = ("rank", "run", *TARGETS, f"minus {against}", "p", "verdict", *COSTS)
    return Table(f"Ranking on fold {fold}, against {against}", columns, tuple(rows), frozenset(bold), note)


def ranking_csv(ranks: Sequence[Rank], fold: str) -> str:
    """The ranking as CSV, every number in full; empty where it is unknown."""
    against = next(rank.name for rank in ranks if rank.reference)
    head = ["rank", "run", "fold", *TARGETS, "average_low", "average_high", "reference", "difference", "difference_low"]
    rows = [[*head, "difference_high", "p", "p_holm", "verdict", "parameters", "ms_per_1000_clips"]]
    for i, rank in enumerate(ranks):
        own = (rank.score.interval or {}).get("average", (None, None))
        d = rank.distance
        distance = (None,) * 3 if d is None else (d.value["average"], *d.interval["average"])
        numbers = [*rank.score.values(), *own, against, *distance, rank.p, rank.adjusted]
        cells = ["" if x is None else f"{x:.6f}" if isinstance(x, float) else str(x) for x in numbers]
        size, time = rank.costs
        tail = [verdict(rank, ranks[0].reference), "" if size is None else str(size), "" if time is None else f"{time:.3f}"]
        rows.append([str(i + 1), rank.name, fold, *cells, *tail])
    return csv_text(rows)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _joined(seeds: Seeds) -> tuple[Float, Float, np.ndarray]:
    """(predictions [K, N, 2], labels [N, 2], videos [N]) over the units in the order of the first seed's names."""
    names = sorted(seeds[0])
    va = np.stack([np.concatenate([run[name].va for name in names]) for run in seeds]).astype(np.float64)
    truth = np.concatenate([seeds[0][name].labels for name in names]).astype(np.float64)
    return va, truth, np.concatenate([np.full(len(seeds[0][name].va), unit_video(name)) for name in names])
