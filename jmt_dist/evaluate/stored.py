"""Predictions that the evaluate stage has stored, by run folder, part and fold; and the smoothing that they call for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jmt_dist.affwild2.layout import video_of
from jmt_dist.errors import UserError
from jmt_dist.evaluate.ensemble import How, combine
from jmt_dist.evaluate.predict import read_predictions
from jmt_dist.evaluate.windows import OutOfFold
from jmt_dist.track.compare import FOLDS, RunResult

Part = Literal["test", "validation"]
FILES: dict[Part, str] = {"test": "test.parquet", "validation": "predictions.parquet"}


def unit_video(unit: str) -> str:
    """The video of a unit, told by its name alone: without `_left` or `_right` at its end."""
    return video_of(unit, {})


def model_of(run: RunResult, model: str = "") -> str:
    """The fusion model asked for, or the run's own. Raises UserError where a run folder does not say."""
    found = model or run.model
    if not found:
        raise UserError(f"{run.out} does not say which fusion model it has", "Write model=….")
    return found


def stored_files(run: RunResult, part: Part, folds: Sequence[str], model: str = "") -> list[Path]:
    """The prediction files of a run, one per fold and seed. `folds` empty: every fold that has some.

    Raises UserError where a fold asked for has none, or no fold has.
    """
    name = model_of(run, model)
    how = "stages=[features,evaluate] evaluate.test=true first: nothing is trained again" if part == "test" else "the evaluate stage first"
    found: list[Path] = []
    for fold in folds or FOLDS:
        files = run.predictions(fold, name, FILES[part])
        if not files and folds:
            raise UserError(f"fold {fold} of {run.out} has no {part} predictions of {name}", f"Run {how}.")
        found += files
    if not found:
        raise UserError(f"{run.out} has no {part} predictions of {name}", f"Run {how}.")
    return found


def out_of_fold(runs: Sequence[RunResult], model: str = "", how: How = "mean") -> OutOfFold:
    """What the folds of `runs` say of their validation units, combined per fold over runs and seeds: what smoothing is chosen on.

    A fold that any of the runs lacks is left out.
    """
    found = {}
    for fold in FOLDS:
        files = [run.predictions(fold, model_of(run, model)) for run in runs]
        if all(files):
            found[fold] = [combine([read_predictions(file) for group in files for file in group], how)]
    return OutOfFold(found, unit_video)
