"""What the folds of an experiment reached, and what the paper's did.

Reads run folders only: `<out>/recipe.yaml`, `<out>/<fold>/status.json` and `<out>/<fold>/metrics.json`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from jmt_dist.errors import UserError
from jmt_dist.track.facts import flatten
from jmt_dist.track.spool import read_params

TARGETS = ("valence", "arousal", "average")
FOLDS = ("official", "fold-1", "fold-2", "fold-3", "fold-4", "fold-5")
NOT_RUN = "not run"  # why a fold that was never begun has no scores
CROSS_VALIDATION = FOLDS[1:]
# groups of a recipe that decide the scores
SETTINGS = ("label", "seed", "folds", "engine", "visual", "audio", "features", "fusion", "finetune", "finetuning", "evaluate")
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
    withheld: Mapping[str, float] = field(default_factory=dict)  # average without that modality
    saturation: Mapping[str, float] = field(default_factory=dict)  # of attention weights, at "start" and "end" of training

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
    costs: Mapping[str, Any] = field(default_factory=dict)  # of the fusion model: parameters, ms_per_1000_clips (costs.json)


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
        return FoldResult(fold, reason=NOT_RUN if not (out / fold).exists() else "no metrics.json")
    found, costs = fold_result(fold, metrics), _read(out / fold / "costs.json") or {}
    return replace(found, costs=costs[found.model]) if isinstance(costs.get(found.model), dict) else found


def fold_result(fold: str, metrics: Mapping[str, Any]) -> FoldResult:
    """A fold from what its metrics.json says."""
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


def other_settings(run: RunResult) -> list[str]:
    """Folds whose results were made with other settings than the run's recipe has, one line each, from what their jobs recorded.

    A recipe given to one fold of a folder is from then on the folder's, and the rows of the other folds are still those of before.
    """
    lines = []
    for row in run.folds:
        made = read_params(run.out / row.fold / "spool", "evaluate") if row.score is not None else {}
        changed = [f"{key}={value}" for key, value in made.items() if _decides(key) and run.recipe.get(key, value) != value]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            lines.append(f"{row.fold} by this recipe: what is shown was made with {', '.join(changed[:3])}{more}")
    return lines


def _decides(key: str) -> bool:
    """Whether a recipe's key can change a fold's scores."""
    group, name = key.split(".")[0], key.split(".")[-1]
    beside = ("keep", "save_steps", "baselines", "baseline_folds", "test", "withhold", "bootstrap")
    return group in SETTINGS and name not in beside and key != "features.batch"


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


def ranked(runs: Sequence[RunResult]) -> list[RunResult]:
    """The best first: by the mean over folds 1 to 5, else by the official fold; those that lack folds others have come after them."""

    def place(run: RunResult) -> tuple[int, float]:
        mean, scores = folds_mean(run), [row.score.average for row in run.folds if row.score is not None]
        return -len(scores), -(mean[0][2] if mean else scores[0] if scores else -math.inf)

    return sorted(runs, key=place)


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
        withheld={str(modality): float(part["average"]) for modality, part in (values.get("withheld") or {}).items()},
        saturation={str(when): float(share) for when, share in (values.get("saturation") or {}).items()},
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
