"""Average stored predictions over seeds and folds, smooth them, and write them as Parquet and, for test units, as the challenge's file.

    python launch/predict_units.py out=runs/paper part=test to=predictions/test.parquet sample=<sample file> challenge=predictions/test.txt
    python launch/predict_units.py out=runs/paper folds=[official] part=validation to=predictions/official.parquet

The evaluate stage stores predictions of validation units, and with evaluate.test=true of test units. Test units: the mean
over all folds and seeds. Validation units: folds have different ones, so one fold at a time, scored where there are labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from jmt_dist.config import Options
from jmt_dist.errors import UsageError, UserError
from jmt_dist.program import OK, run
from jmt_dist.recipe import build, word_layer


class PredictOptions(Options):
    """Which predictions, and what to make of them."""

    out: str = Field(description="run folder, as submit_folds.py printed it")
    to: str = Field(description="Parquet file to write")
    part: Literal["test", "validation"] = Field("test", description="test units, or the validation units of one fold")
    folds: list[str] = Field(
        [], description="folds whose predictions are averaged; empty: all that have some (test), or official (validation)"
    )
    model: str = Field("", description="fusion model; empty: the recipe's")
    smooth_valence: Annotated[int, Field(gt=0)] = Field(1, description="box window in frames for valence; 1 = none")
    smooth_arousal: Annotated[int, Field(gt=0)] = Field(1, description="box window in frames for arousal; 1 = none")
    sample: str = Field("", description="the challenge's sample file: fixes order and number of the rows of challenge=")
    challenge: str = Field("", description="challenge file to write; needs sample=")
    decimals: Annotated[int, Field(ge=3, le=6)] = Field(6, description="decimals in the challenge file")


def main(words: list[str]) -> int:
    """Read, average, smooth, score, write."""
    options = build(PredictOptions, [word_layer(word) for word in words])
    if bool(options.sample) != bool(options.challenge):
        raise UsageError("`sample` and `challenge` go together", "Write both, or neither.")
    from jmt_dist.evaluate.predict import average, read_predictions, write_predictions
    from jmt_dist.evaluate.smooth import smooth

    files = _files(options)
    print(f"averaging {len(files)} predictions:", *files, sep="\n  ", flush=True)
    units = average([read_predictions(file) for file in files])
    va = {name: smooth(unit.va, options.smooth_valence, options.smooth_arousal) for name, unit in units.items()}
    write_predictions(Path(options.to), va, {name: unit.labels for name, unit in units.items()})
    _score(va, units)
    if options.challenge:
        from jmt_dist.evaluate.challenge import write_challenge

        report = write_challenge(Path(options.challenge), Path(options.sample), va, options.decimals)
        unused = f"; {len(report.unused)} predicted units are not in the sample" if report.unused else ""
        print(f"{report.rows} rows of {report.units} units, {report.clipped} numbers clipped{unused}")
    print(options.challenge or options.to)
    return OK


def _files(options: PredictOptions) -> list[Path]:
    """The prediction files that the words name. Raises UserError where a fold asked for has none."""
    from jmt_dist.track.compare import FOLDS, read_run

    run_folder = read_run(Path(options.out))
    model = options.model or run_folder.model
    if not model:
        raise UserError(f"{options.out} does not say which fusion model it has", "Write model=….")
    if options.part == "validation" and len(options.folds) > 1:
        raise UsageError("the validation units of several folds are not the same ones", "Write one fold, as folds=[fold-1].")
    name = "test.parquet" if options.part == "test" else "predictions.parquet"
    found: list[Path] = []
    for fold in options.folds or (FOLDS if options.part == "test" else ("official",)):
        files = run_folder.predictions(fold, model, name)
        if not files and options.folds:
            raise UserError(f"fold {fold} of {options.out} has no {options.part} predictions of {model}", _remedy(options))
        found += files
    if not found:
        raise UserError(f"{options.out} has no {options.part} predictions of {model}", _remedy(options))
    return found


def _remedy(options: PredictOptions) -> str:
    return f"Run the evaluate stage{' with evaluate.test=true' if options.part == 'test' else ''} first."


def _score(va: dict[str, Any], units: dict[str, Any]) -> None:
    """Print CCC where there are labels."""
    import numpy as np

    from jmt_dist.evaluate.metric import scores

    labels = np.concatenate([units[name].labels for name in va])
    print(f"{len(va)} units, {len(labels)} frames", end="")
    if np.isfinite(labels).all(axis=1).sum() < 2:
        print(", no labels")
        return
    result = scores(np.concatenate(list(va.values())), labels)
    print(f", {result.frames} with labels: CCC valence {result.valence:.3f}, arousal {result.arousal:.3f}, average {result.average:.3f}")


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", PredictOptions)])
