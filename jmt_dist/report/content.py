"""What the report of a run and of several runs shows, put together from their folders; what cannot be shown is an omission."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jmt_dist.errors import UserError
from jmt_dist.evaluate.bootstrap import ccc_of_sums, video_sums
from jmt_dist.evaluate.predict import read_predictions
from jmt_dist.evaluate.stored import unit_video
from jmt_dist.evaluate.windows import OutOfFold
from jmt_dist.report import figures
from jmt_dist.report.behaviour import behaviour_table
from jmt_dist.report.page import Content
from jmt_dist.report.pairs import common_fold, rank_runs, ranking_csv, ranking_table, reference_of, smoothing_gain
from jmt_dist.report.tables import Table, runs_table, systems_table, table1
from jmt_dist.report.traces import NOTICE, RENDERED, choose_units, make_traces
from jmt_dist.report.units import UnitResult, extremes_table, fold_predictions, read_material, unit_results
from jmt_dist.track.compare import FOLDS, NOT_RUN, RunResult, Score, other_settings

T = TypeVar("T")


@dataclass(frozen=True)
class Wishes:
    """What of a run is shown in detail: which fold's units (empty: the first that has predictions), which units, their faces."""

    fold: str = ""
    units: tuple[str, ...] = ()
    frames: bool = False


@dataclass
class Gathered:
    """A report's content, and what else is written beside it."""

    content: Content
    tables: list[Table] = field(default_factory=list)
    units: list[UnitResult] = field(default_factory=list)
    smoothing: dict[str, Any] = field(default_factory=dict)
    ranking: str = ""  # as CSV

    def add(self, table: Table | None) -> None:
        """The next table of the report and of the files beside it."""
        if table is not None:
            self.tables.append(table)
            self.content.parts.append(table)


def of_run(run: RunResult, ceilings: Mapping[str, Score] | None, wishes: Wishes) -> Gathered:
    """Everything about one run. Raises UserError for wishes that cannot be met: no such unit or fold."""
    on = "the folds" if ceilings is None else "the folds of a fixture"
    content = Content(f"{run.name}: {run.model or 'fusion model'} on {on}", f"run folder {run.out.resolve()}", recipe=run.recipe)
    content.omissions += [f"{row.fold}: {row.reason}" for row in run.missing]
    content.omissions += _try(content, "settings of the folds", partial(other_settings, run)) or []
    found = Gathered(content, [table1(run)])
    content.parts += [*found.tables, ("Folds beside the paper's numbers; lines: 95 % interval", figures.fold_bars(run))]
    behaviours: dict[str, Score] = {}
    for row in run.folds:
        known = ceilings if row.fold == "official" else None
        if row.score is None:
            continue
        systems = {row.model: row.score, **dict(sorted(row.baselines.items(), key=lambda item: -item[1].average))}
        table = systems_table(row, known)
        if table is not None:
            found.add(table)
            content.parts.append((f"Systems on fold {row.fold}", figures.system_bars(systems, known)))
        behaviours.update({f"{row.fold}: {name}": score for name, score in systems.items()})
    found.add(behaviour_table(behaviours))
    smoothing = _try(content, "smoothing", partial(_smoothing, run, found.smoothing))
    found.add(smoothing)
    caption = "Learning curves. The training loss is that of small batches: it is not comparable with the validation score"
    curves = _try(content, "learning curves", partial(figures.learning_curves, run))
    if curves:
        content.parts.append((caption, curves))
    _units(run, wishes, found)
    return found


def of_runs(runs: Sequence[RunResult], title: str = "Runs compared", reference: str = "") -> Gathered:
    """Several runs: their scores, and a ranking with the significance of every distance from the `reference` (`reference_of`).

    Raises UserError where no run is called so.
    """
    against = reference_of(runs, reference)
    content = Content(title, ", ".join(run.name for run in runs))
    content.omissions += _lacking(runs)
    found = Gathered(content, [runs_table(runs)])
    content.parts += found.tables
    fold = common_fold(runs) if len(runs) > 1 else None
    if fold is not None:
        ranks = _try(content, "ranking", lambda: rank_runs(runs, fold, reference=against))
        if ranks is not None:
            found.ranking = ranking_csv(ranks, fold)
            found.add(ranking_table(ranks, fold))
    elif len(runs) > 1:
        content.omissions.append("ranking: there is no fold of which all runs have predictions")
    shown = FOLDS.index(fold or FOLDS[0])
    found.add(behaviour_table({run.name: score for run in runs if (score := run.folds[shown].score) is not None}, FOLDS[shown]))
    systems: dict[str, Score] = {run.name: run.folds[0].score for run in runs if run.folds[0].score is not None}
    if systems:
        content.parts.append(("Official fold: CCC with 95 % intervals", figures.system_bars(systems, None)))
    return found


def _lacking(runs: Sequence[RunResult]) -> list[str]:
    """What runs lack, a line for each run and reason; a fold that none of them has begun was not asked for."""
    begun = {row.fold for run in runs for row in run.folds if row.reason != NOT_RUN}
    lines = []
    for run in runs:
        folds: dict[str, list[str]] = {}
        for row in run.missing:
            if row.fold in begun or not begun:
                folds.setdefault(row.reason, []).append(row.fold)
        lines += [f"{run.name}, {', '.join(names)}: {reason}" for reason, names in folds.items()]
    return lines


def _try(content: Content, what: str, make: Callable[[], T]) -> T | None:
    """What keeps a part from being made is an omission, since the tables matter more."""
    try:
        return make()
    except Exception as error:
        content.omissions.append(f"{what}: {error if isinstance(error, UserError) else f'{type(error).__name__}: {error}'}")
        return None


def _smoothing(run: RunResult, record: dict[str, Any]) -> Table | None:
    """The filters that the other folds choose for each fold, and what they add to its raw score; None with fewer than two folds."""
    files = {row.fold: run.predictions(row.fold, row.model or run.model) for row in run.folds if row.score is not None}
    seeds = {fold: [read_predictions(file) for file in paths] for fold, paths in files.items() if paths}
    if len(seeds) < 2:
        return None
    others = OutOfFold(seeds, unit_video)
    rows = []
    for fold, runs in seeds.items():
        choice = others.choose(fold)
        if choice is None:
            continue
        gain, smoothed = smoothing_gain(runs, choice)
        labels = np.concatenate([runs[0][name].labels for name in sorted(runs[0])])
        raw = np.stack([np.concatenate([one[name].va for name in sorted(one)]) for one in runs])
        before, after = (ccc_of_sums(video_sums(va, labels, np.zeros(len(labels), str)).sum(axis=1))[2] for va in (raw, smoothed))
        interval = gain.interval["average"] if gain is not None else None
        shown = f"{after - before:+.3f}" + (f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "")
        rows.append((fold, str(choice.valence), str(choice.arousal), f"{before:.3f}", f"{after:.3f}", shown))
        record[fold] = {
            "valence": {"kind": choice.valence.kind, "window": choice.valence.window},
            "arousal": {"kind": choice.arousal.kind, "window": choice.arousal.window},
            "chosen_on": {"folds": choice.folds, "videos": choice.videos, "raw": choice.raw, "smoothed": choice.smoothed},
            "raw": before,
            "smoothed": after,
            "gain": after - before,
            "gain_interval": interval,
        }
    note = (
        "Window kind and frames for each target, chosen by the score on units that the other folds held out and that are no video of "
        "this fold's validation set. Table 1 shows raw scores; the gain is the smoothed average minus the raw one, with its 95 % interval "
        "by paired bootstrap over videos."
    )
    columns = ("fold", "valence", "arousal", "raw average", "smoothed average", "gain")
    return Table("Smoothing", columns, tuple(rows), note=note) if rows else None


def _units(run: RunResult, wishes: Wishes, found: Gathered) -> None:
    """The parts about single units, of one fold; the units of all folds go into units.csv."""
    content = found.content
    if wishes.fold and wishes.fold not in FOLDS:
        raise UserError(f"there is no fold `{wishes.fold}`", f"Folds are: {', '.join(FOLDS)}.")
    shards = Path(run.recipe.get("data.shards", ""))
    material = read_material(shards) if run.recipe.get("data.shards") else {}
    shown = None
    for row in run.folds:
        predictions = _try(content, f"predictions of {row.fold}", partial(fold_predictions, run, row.fold))
        if predictions:
            units = unit_results(row.fold, predictions, material)
            found.units += units
            if shown is None and wishes.fold in ("", row.fold):
                shown = (predictions, units)
    if shown is None:
        if wishes.units or wishes.fold:
            raise UserError(f"{run.out} has no predictions of fold {wishes.fold or 'any'}", "Run the evaluate stage first.")
        return
    predictions, units = shown
    fold = units[0].fold
    captions = {
        f"Prediction against label, fold {fold}": partial(figures.density, predictions),
        f"Circumplex: labels and predictions, fold {fold}": partial(figures.circumplex, predictions),
        f"Error by unit, fold {fold}; a dot's size is the unit's length": partial(figures.unit_errors, units),
    }
    for caption, make in captions.items():
        figure = _try(content, caption, make)
        if figure:
            content.parts.append((caption, figure))
    table = extremes_table(units)
    found.add(table)
    chosen = choose_units(units, wishes.units)
    notice = _notice(shards, wishes)
    traces = _try(content, "pictures of units", lambda: make_traces(chosen, predictions, shards)) if notice else None
    content.notice = notice if traces is not None else ""
    content.traces = traces if traces is not None else make_traces(chosen, predictions, None)


def _notice(shards: Path, wishes: Wishes) -> str:
    """What is to be said of the faces in a report, "" where there are none: the fixture's always, a dataset's on request."""
    from jmt_dist.data.shards import read_manifest

    try:
        return RENDERED if read_manifest(shards).release == "fixture" else NOTICE if wishes.frames else ""
    except UserError:
        return NOTICE if wishes.frames else ""  # which then fails, and is said
