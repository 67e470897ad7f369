"""What the folds of an experiment reached, as the paper's Table 1 shows it, and several experiments side by side.

Reads run folders only: `<out>/recipe.yaml`, `<out>/<fold>/status.json` and `<out>/<fold>/metrics.json`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jmt_dist.errors import UserError
from jmt_dist.track.facts import flatten

TARGETS = ("valence", "arousal", "average")
FOLDS = ("official", "fold-1", "fold-2", "fold-3", "fold-4", "fold-5")
CROSS_VALIDATION = FOLDS[1:]
# valence, arousal, average as printed in the paper's Table 1
PAPER_TABLE1: dict[str, tuple[float, float, float]] = {
    "official": (0.717, 0.614, 0.666),
    "fold-1": (0.705, 0.683, 0.694),
    "fold-2": (0.741, 0.623, 0.682),
    "fold-3": (0.657, 0.637, 0.647),
    "fold-4": (0.760, 0.666, 0.713),
    "fold-5": (0.684, 0.629, 0.657),
}


@dataclass(frozen=True)
class Score:
    """CCC of one system on one fold: mean over `seeds` trainings, 95 % interval over videos, spread over seeds."""

    valence: float
    arousal: float
    average: float
    interval: Mapping[str, tuple[float, float]] | None = None
    seeds: int = 1
    spread: Mapping[str, float] = field(default_factory=dict)  # standard deviation over seeds

    def values(self) -> tuple[float, float, float]:
        """(valence, arousal, average)."""
        return self.valence, self.arousal, self.average


@dataclass(frozen=True)
class FoldResult:
    """One row: the fold's score, or None and the `reason` why there is none."""

    fold: str
    score: Score | None = None
    reason: str = ""
    model: str = ""
    baselines: Mapping[str, Score] = field(default_factory=dict)
    frames: int = 0
    units: int = 0


@dataclass(frozen=True)
class RunResult:
    """One experiment: its run folder, name, recipe (dotted keys to text) and six folds."""

    out: Path
    name: str
    recipe: Mapping[str, str]
    folds: tuple[FoldResult, ...]

    @property
    def missing(self) -> tuple[FoldResult, ...]:
        """Folds without a score."""
        return tuple(row for row in self.folds if row.score is None)

    @property
    def model(self) -> str:
        """The fusion model that was trained."""
        return next((row.model for row in self.folds if row.model), self.recipe.get("fusion.model", ""))

    def predictions(self, fold: str, model: str, name: str = "predictions.parquet") -> list[Path]:
        """The prediction files of a fold's trainings of `model`: those of the recipe's seeds, not what earlier work left there."""
        folder = self.out / fold / "evaluate"
        seeds = self.recipe.get("fusion.seeds")
        if seeds is None:
            return sorted(folder.glob(f"{model}-seed*/{name}"))
        return [path for seed in json.loads(seeds) if (path := folder / f"{model}-seed{seed}" / name).is_file()]


def read_run(out: Path) -> RunResult:
    """Read the six folds of a run folder. Raises UserError where it is none; a fold without results is a row with its reason."""
    if not out.is_dir():
        raise UserError(f"there is no run folder {out}", "submit_folds.py prints the folder it makes.")
    recipe: Any = {}
    if (out / "recipe.yaml").is_file():
        try:
            recipe = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError):
            raise UserError(f"{out / 'recipe.yaml'} cannot be read", "Submit the run again.") from None
    elif not any((out / fold).is_dir() for fold in FOLDS):
        raise UserError(f"{out} is no run folder: it has no recipe.yaml and no folds", "Give the folder that submit_folds.py printed.")
    recipe = recipe if isinstance(recipe, dict) else {}
    return RunResult(out, str(recipe.get("name", out.name)), flatten(recipe), tuple(read_fold(out, fold) for fold in FOLDS))


def read_fold(out: Path, fold: str) -> FoldResult:
    """A fold's metrics; those of a fold that is not done are not shown, since they may be of other work before it."""
    status, metrics = _read(out / fold / "status.json"), _read(out / fold / "metrics.json")
    state = str((status or {}).get("state", ""))
    if state not in ("", "done"):
        stage, reason = (str((status or {}).get(key) or "") for key in ("stage", "reason"))
        return FoldResult(fold, reason=" ".join([state, *([f"in {stage}"] if stage else []), *([f"({reason})"] if reason else [])]))
    if metrics is None:
        return FoldResult(fold, reason="not run" if not (out / fold).exists() else "no metrics.json")
    try:
        baselines = {str(name): _score(values) for name, values in (metrics.get("baselines") or {}).items()}
        return FoldResult(
            fold,
            _score(metrics),
            model=str(metrics.get("model", "")),
            baselines=baselines,
            frames=int(metrics.get("frames", 0)),
            units=int(metrics.get("units", 0)),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return FoldResult(fold, reason="metrics.json cannot be read")


def read_ceilings(fixture: Path) -> dict[str, Score]:
    """The best CCC that the fixture's noise allows, from its face, its voice and both (`fixture.json`), on the validation units."""
    values = _read(fixture)
    if values is None:
        raise UserError(f"{fixture} is no fixture.json", "make_fixture.py writes it into the folder it makes.")
    found: Any = (values.get("ceiling_by_split") or {}).get("validation") or values.get("ceiling")
    try:
        return {name: _score(found[name]) for name in ("visual", "audio", "both")}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{fixture} holds no ceilings", "Make the fixture again.") from None


def mean_and_std(rows: Iterable[Sequence[float]]) -> tuple[list[float], list[float]] | None:
    """Mean and sample standard deviation of each column; None for fewer than two rows."""
    columns = list(zip(*rows, strict=True))
    if not columns or len(columns[0]) < 2:
        return None
    return [statistics.fmean(column) for column in columns], [statistics.stdev(column) for column in columns]


def folds_mean(run: RunResult) -> tuple[list[float], list[float]] | None:
    """Mean and spread over the folds 1 to 5 that have a score; the official fold shares its units with them."""
    return mean_and_std(row.score.values() for row in run.folds if row.fold in CROSS_VALIDATION and row.score is not None)


def paper_mean() -> tuple[list[float], list[float]]:
    """Mean and spread over the paper's folds 1 to 5."""
    found = mean_and_std(PAPER_TABLE1[fold] for fold in CROSS_VALIDATION)
    assert found is not None
    return found


def table1_csv(run: RunResult) -> str:
    """The six rows as CSV: fold,valence,arousal,average; `nan` where a fold has no score."""
    rows = [[row.fold, *(f"{v:.6f}" for v in _values(row.score))] for row in run.folds]
    return _csv([["fold", *TARGETS], *rows])


@dataclass(frozen=True)
class Table:
    """A table as text, for the terminal, Markdown and HTML alike; `bold` holds (row, column) of the best cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]] = frozenset()
    note: str = ""


def table1(run: RunResult) -> Table:
    """Table 1: CCC and 95 % interval of each fold, the paper's numbers beside, and the mean over folds 1 to 5."""
    rows: list[tuple[str, ...]] = []
    for row in run.folds:
        own = [_with_interval(row.score, i) for i in range(3)] if row.score else [row.reason, "", ""]
        rows.append((row.fold, *own, *(f"{value:.3f}" for value in PAPER_TABLE1[row.fold])))
    mean = folds_mean(run)
    count = sum(row.fold in CROSS_VALIDATION and row.score is not None for row in run.folds)
    own = [f"{m:.3f} ± {s:.3f}" for m, s in zip(*mean, strict=True)] if mean else ["–"] * 3
    paper = [f"{m:.3f} ± {s:.3f}" for m, s in zip(*paper_mean(), strict=True)]
    rows.append((f"mean of {count} fold{'' if count == 1 else 's'}", *own, *paper))
    bold = _best_cells([_values(row.score) for row in run.folds], 1) | _best_cells([PAPER_TABLE1[row.fold] for row in run.folds], 4)
    return Table(
        f"Table 1: CCC of {run.model or 'the fusion model'} on each fold ({run.name})",
        ("fold", "valence", "arousal", "average", "paper: valence", "paper: arousal", "paper: average"),
        tuple(rows),
        bold,
        "Brackets: 95 % interval by bootstrap over videos. Bold: the highest of its column. "
        "The last row is the mean and standard deviation of folds 1 to 5.",
    )


def systems_table(row: FoldResult, ceilings: Mapping[str, Score] | None = None) -> Table | None:
    """The fusion model beside its baselines on one fold, and the fixture's ceilings; None where there is nothing to compare."""
    if row.score is None or not (row.baselines or ceilings):
        return None
    ranked = sorted(row.baselines.items(), key=lambda item: -item[1].average)
    systems = [(row.model, row.score), *ranked]
    cells = [(f"{name} ({_seeds(score)})", *(_with_interval(score, i) for i in range(3)), _spread(score)) for name, score in systems]
    bold = _best_cells([score.values() for _, score in systems], 1)
    for name, score in (ceilings or {}).items():
        cells.append((f"ceiling: {name}", *(f"{value:.3f}" for value in score.values()), ""))
    note = "A ceiling is the CCC of the best possible estimate from that modality's noisy cues, on the same units." if ceilings else ""
    return Table(f"Systems on fold {row.fold}", ("system", *TARGETS, "± over seeds"), tuple(cells), bold, note)


def runs_table(runs: Sequence[RunResult]) -> Table:
    """Several experiments: official fold with its interval, mean of folds 1 to 5, and what their recipes change."""
    changed = changed_keys(runs)
    rows, official, means = [], [], []
    for run in runs:
        score, mean = run.folds[0].score, folds_mean(run)
        official.append(_values(score))
        means.append((mean[0][2] if mean else math.nan,))
        own = [_with_interval(score, i) for i in range(3)] if score else [run.folds[0].reason, "", ""]
        done = len(run.folds) - len(run.missing)
        across = f"{mean[0][2]:.3f} ± {mean[1][2]:.3f}" if mean else "–"
        rows.append((run.name, *own, across, f"{done} of {len(run.folds)}", *(run.recipe.get(key, "") for key in changed)))
    bold = _best_cells(official, 1) | _best_cells(means, 4)
    columns = ("run", *(f"official: {t}" for t in TARGETS), "folds 1-5: average", "folds done", *changed)
    return Table("Runs compared", columns, tuple(rows), bold, "CCC; brackets: 95 % interval by bootstrap over videos.")


def ranked(runs: Sequence[RunResult]) -> list[RunResult]:
    """The best first: by the mean over folds 1 to 5, else by the official fold; those that lack folds others have come after them."""

    def place(run: RunResult) -> tuple[int, float]:
        mean, scores = folds_mean(run), [row.score.average for row in run.folds if row.score is not None]
        return -len(scores), -(mean[0][2] if mean else scores[0] if scores else -math.inf)

    return sorted(runs, key=place)


def changed_keys(runs: Sequence[RunResult], limit: int = 6) -> list[str]:
    """Recipe keys whose values differ between runs, at most `limit`; `name` is the row's title already."""
    keys = sorted({key for run in runs for key in run.recipe} - {"name"})
    return [key for key in keys if len({run.recipe.get(key) for run in runs}) > 1][:limit]


def runs_csv(runs: Sequence[RunResult]) -> str:
    """One row per run and fold: run, fold, scores, interval bounds of the average; `nan` where there is no score."""
    rows = [["run", "fold", *TARGETS, "average_low", "average_high"]]
    for run in runs:
        for row in run.folds:
            low, high = (row.score.interval or {}).get("average", (math.nan, math.nan)) if row.score else (math.nan, math.nan)
            rows.append([run.name, row.fold, *(f"{v:.6f}" for v in (*_values(row.score), low, high))])
    return _csv(rows)


def markdown(table: Table) -> str:
    """A table in Markdown, best cells bold."""
    lines = [f"### {table.title}", "", f"| {' | '.join(table.columns)} |", f"|{'---|' * len(table.columns)}"]
    for i, row in enumerate(table.rows):
        cells = [f"**{cell}**" if (i, j) in table.bold else cell for j, cell in enumerate(row)]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, *(["", table.note] if table.note else []), ""])


def _score(values: Mapping[str, Any]) -> Score:
    numbers = [float(values[target]) for target in TARGETS]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("a score is not a number")
    interval = values.get("interval")
    seeds = [[float(seed[target]) for target in TARGETS] for seed in values.get("seeds") or []]
    spread = mean_and_std(seeds)
    return Score(
        numbers[0],
        numbers[1],
        numbers[2],
        interval={t: (float(interval[t][0]), float(interval[t][1])) for t in TARGETS} if interval else None,
        seeds=max(1, len(seeds)),
        spread=dict(zip(TARGETS, spread[1], strict=True)) if spread else {},
    )


def _with_interval(score: Score, index: int) -> str:
    text = f"{score.values()[index]:.3f}"
    if score.interval is None:
        return text
    low, high = score.interval[TARGETS[index]]
    return f"{text} [{low:.3f}, {high:.3f}]"


def _seeds(score: Score) -> str:
    return "1 seed" if score.seeds == 1 else f"mean of {score.seeds} seeds"


def _spread(score: Score) -> str:
    return " / ".join(f"{score.spread[target]:.3f}" for target in TARGETS) if score.spread else ""


def _values(score: Score | None) -> tuple[float, ...]:
    return score.values() if score else (math.nan,) * 3


def _best_cells(rows: Sequence[Sequence[float]], first: int) -> frozenset[tuple[int, int]]:
    """(row, column) of the highest number of each column, columns counted from `first`; none where there is one number only."""
    cells: set[tuple[int, int]] = set()
    for c, column in enumerate(zip(*rows, strict=True)):
        known = [i for i, value in enumerate(column) if math.isfinite(value)]
        if len(known) > 1:
            cells.add((max(known, key=column.__getitem__), first + c))
    return frozenset(cells)


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
