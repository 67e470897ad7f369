"""Predictions as files: those that a run has stored, combined and smoothed, as Parquet and as the challenge's file; or of new material.

    python launch/predict_units.py out=runs/paper split=test to=test.parquet sample=<sample file> challenge=test.txt
    python launch/predict_units.py out=runs/paper split=test to=test.parquet also=[runs/reference] combine=centred smooth=chosen
    python launch/predict_units.py out=runs/paper split=validation folds=[official] to=official.parquet
    python launch/predict_units.py out=runs/paper crops=<folder of 00001.jpg, …> media=<video or WAV> to=new.parquet

The evaluate stage stores predictions of validation units, and with evaluate.test=true of test units. Test units: combined over
all folds and seeds. Validation units: folds have different ones, so one fold at a time, scored where there are labels.
smooth=chosen takes the windows that score best on units that the folds held out. New material: face crops aligned as the dataset's,
112x112, numbered from 1 as the frames are, and the video (or only its sound as WAV, with fps=); `out` may be an exported folder too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from jmt_dist.config import Options, Smoother
from jmt_dist.errors import UsageError
from jmt_dist.program import OK, OMISSIONS, run
from jmt_dist.recipe import build, word_layer

Window = Annotated[int, Field(gt=0)]


class PredictOptions(Options):
    """Which predictions, and what to make of them."""

    out: str = Field(description="run folder, as submit_folds.py printed it; for new material also a folder of export_model.py")
    to: str = Field("", description="Parquet file to write; empty: predictions-<split or name>.parquet in the current folder")
    split: Literal["test", "validation"] = Field("test", description="test units, or the validation units of one fold")
    folds: list[str] = Field([], description="folds that are combined; empty: all that have predictions (test), or official (validation)")
    model: str = Field("", description="fusion model; empty: the recipe's")
    also: list[str] = Field([], description="further run folders whose predictions are combined with those of out")
    combine: Literal["mean", "centred"] = Field("mean", description="mean, or mean after bringing all to a common mean and spread")
    smooth: Literal["", "chosen"] = Field("", description="chosen: windows by the score on units that the folds held out")
    smooth_valence: Window = Field(1, description="smoothing window in frames for valence; 1 = none")
    smooth_arousal: Window = Field(1, description="smoothing window in frames for arousal; 1 = none")
    smooth_valence_kind: Smoother = Field("box", description="kind of the window for valence")
    smooth_arousal_kind: Smoother = Field("box", description="kind of the window for arousal")
    sample: str = Field("", description="the challenge's sample file: fixes order and number of the rows of challenge=")
    challenge: str = Field("", description="challenge file to write; empty, with sample=: challenge.txt in the current folder")
    per_unit: str = Field("", description="folder for one text file per unit, the format of the first two editions")
    decimals: Annotated[int, Field(ge=3, le=6)] = Field(6, description="decimals in challenge= and per_unit=")
    crops: str = Field("", description="new material: folder of aligned face crops 00001.jpg, 00002.jpg, …; missing ones are black")
    media: str = Field("", description="new material: its video, or its sound alone; empty: silence")
    fps: Annotated[float, Field(gt=0)] = Field(30.0, description="new material without a video: frames per second")
    seed: Annotated[int, Field(ge=-1)] = Field(-1, description="new material: seed of the training; -1: the recipe's first")
    device: Literal["cpu", "cuda"] = Field("cpu", description="new material: where the networks run")


def main(words: list[str]) -> int:
    """Read or predict, combine, smooth, score, write."""
    options = build(PredictOptions, [word_layer(word) for word in words])
    if options.challenge and not options.sample:
        raise UsageError("`challenge` needs `sample`", "Name the sample file of the challenge: it fixes the rows.")
    if options.media and not options.crops:
        raise UsageError("`media` goes with `crops`", "Name the folder of face crops too.")
    if options.crops and (options.sample or options.also or options.smooth):
        raise UsageError("`crops` is new material: `sample`, `also` and `smooth` are for stored predictions", "Leave one of them out.")
    if options.crops and len(options.folds) > 1:
        raise UsageError("new material is predicted by the networks of one fold", "Write one, as folds=[fold-1].")
    if options.smooth and max(options.smooth_valence, options.smooth_arousal) > 1:
        raise UsageError("`smooth=chosen` chooses the windows that `smooth_valence` and `smooth_arousal` set", "Leave one of them out.")
    return _new(options) if options.crops else _stored(options)


def _stored(options: PredictOptions) -> int:
    from jmt_dist.evaluate.ensemble import combine
    from jmt_dist.evaluate.predict import read_predictions
    from jmt_dist.evaluate.stored import out_of_fold, stored_files
    from jmt_dist.track.compare import read_run

    if options.split == "validation" and len(options.folds) > 1:
        raise UsageError("the validation units of several folds are not the same ones", "Write one fold, as folds=[fold-1].")
    runs = [read_run(Path(folder)) for folder in (options.out, *options.also)]
    folds = options.folds or ([] if options.split == "test" else ["official"])
    files = [file for found in runs for file in stored_files(found, options.split, folds, options.model)]
    print(f"combining {len(files)} predictions ({options.combine}):", *files, sep="\n  ", flush=True)
    units = combine([read_predictions(file) for file in files], options.combine)
    filters: Any = _filters(options)
    code = OK
    if options.smooth:
        others = out_of_fold(runs, options.model, options.combine)
        choice = others.choose(folds[0]) if options.split == "validation" else others.choose("test", ())
        if choice is None:
            print("missing: smoothing: no other fold has predictions to choose windows on")
            code = OMISSIONS
        else:
            filters = choice.valence, choice.arousal
            print(f"smoothing chosen on {choice.videos} videos that {', '.join(choice.folds)} held out:", end=" ")
            print(f"valence {choice.valence} ({choice.raw[0]:.3f} to {choice.smoothed[0]:.3f}),", end=" ")
            print(f"arousal {choice.arousal} ({choice.raw[1]:.3f} to {choice.smoothed[1]:.3f})")
    _write(options, units, filters, options.split)
    return code


def _filters(options: PredictOptions) -> tuple[Any, Any]:
    from jmt_dist.evaluate.smooth import Filter

    return Filter(options.smooth_valence_kind, options.smooth_valence), Filter(options.smooth_arousal_kind, options.smooth_arousal)


def _new(options: PredictOptions) -> int:
    import numpy as np

    from jmt_dist.evaluate.estimator import load_estimator
    from jmt_dist.evaluate.material import read_material
    from jmt_dist.evaluate.predict import UnitPrediction

    estimator = load_estimator(Path(options.out), (options.folds or ["official"])[0], options.model, options.seed)
    own = estimator.source  # an exported folder's is what it is, whatever was asked for
    if options.folds not in ([], [own.fold]) or options.model not in ("", own.model) or options.seed not in (-1, own.seed):
        raise UsageError(f"{options.out} is {own.model} of fold {own.fold}, seed {own.seed}", "Leave out `folds`, `model` and `seed`.")
    material = read_material(Path(options.crops), Path(options.media) if options.media else None, options.fps)
    for line in material.notes:
        print(line, flush=True)
    va = estimator.to(options.device).predict(material, progress=lambda done, total: print(f"sample {done} of {total}", flush=True))
    name = Path(options.media or options.crops).stem
    _write(options, {name: UnitPrediction(va, np.full_like(va, np.nan))}, _filters(options), name)
    return OK


def _write(options: PredictOptions, units: dict[str, Any], filters: tuple[Any, Any], name: str) -> None:
    """Smooth, score, and write every file that is asked for; the last line is the path of the most special one."""
    from jmt_dist.evaluate.challenge import write_challenge, write_units
    from jmt_dist.evaluate.predict import write_predictions
    from jmt_dist.evaluate.smooth import smooth

    va = {unit: smooth(one.va, *filters).clip(-1, 1) for unit, one in units.items()}
    to = options.to or f"predictions-{name}.parquet"
    write_predictions(Path(to), va, {unit: one.labels for unit, one in units.items()})
    smoothed = any(how.window > 1 for how in filters)
    _score("before smoothing: " if smoothed else "", {unit: one.va for unit, one in units.items()}, units)
    if smoothed:
        _score(f"valence {filters[0]}, arousal {filters[1]}: ", va, units)
    challenge = options.challenge or ("challenge.txt" if options.sample else "")
    if challenge:
        report = write_challenge(Path(challenge), Path(options.sample), va, options.decimals)
        print(f"{report.rows} rows of {report.units} units, {report.clipped} numbers clipped; checked against {options.sample}")
        if report.unused:
            print(f"not in the sample file, left out: units {', '.join(report.unused)}")
        for unit, rows in (report.unused_frames or {}).items():
            print(f"not in the sample file, left out: {rows} frames of unit {unit}")
    if options.per_unit:  # after all that can be refused: it is written once only
        print(f"{write_units(Path(options.per_unit), va, options.decimals).units} files in {options.per_unit}")
    print(challenge or options.per_unit or to)


def _score(what: str, va: dict[str, Any], units: dict[str, Any]) -> None:
    """Print CCC where there are labels."""
    import numpy as np

    from jmt_dist.evaluate.metric import scores

    labels = np.concatenate([units[name].labels for name in va])
    print(f"{what}{len(va)} units, {len(labels)} frames", end="")
    if np.isfinite(labels).all(axis=1).sum() < 2:
        print(", no labels")
        return
    result = scores(np.concatenate(list(va.values())), labels)
    print(f", {result.frames} with labels: CCC valence {result.valence:.3f}, arousal {result.arousal:.3f}, average {result.average:.3f}")


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", PredictOptions)])
