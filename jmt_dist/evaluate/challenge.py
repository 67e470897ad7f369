"""The challenge's submission: one file in the sample file's rows and order (ABAW editions 3 and later), or one file per unit (1 and 2)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jmt_dist.affwild2.labels import read_text
from jmt_dist.errors import UserError

HEADER = "image_location,valence,arousal"
UNIT_HEADER = "valence,arousal"
UNCHANGED = "Give an unchanged sample file."


@dataclass(frozen=True)
class ChallengeReport:
    """What was written: rows and units, how many numbers were clipped, predicted units that the sample does not name,
    and predicted frames of its units that it does not name (the sample decides: they are left out)."""

    path: Path
    rows: int
    units: int
    clipped: int
    unused: tuple[str, ...] = ()
    unused_frames: Mapping[str, int] | None = None


def read_sample(sample_file: Path) -> Iterator[tuple[str, str, int]]:
    """(image location, unit, frame) of each row of a sample file; frames count from 1.

    Raises UserError where the file is missing, no text, has another header, or a row is not `<unit>/<number>.jpg,…`.
    """
    if not sample_file.is_file():
        raise UserError(f"there is no sample file {sample_file}", "It comes with the challenge's test set list.")
    header, *lines = read_text(sample_file).splitlines() or [""]
    if header.strip().replace(" ", "") not in (HEADER, "image_location"):
        raise UserError(f"{sample_file} begins with `{header.strip()[:80]}`, not with `{HEADER}`", "Give the valence/arousal sample file.")
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        location = line.split(",", 1)[0].strip()
        found = re.fullmatch(r"(.+)/0*([1-9]\d*)\.\w+", location)
        if found is None:
            raise UserError(f"{sample_file}, line {number}: `{location[:80]}` is not <unit>/<frame>.jpg", UNCHANGED)
        yield location, found[1], int(found[2])


def write_challenge(path: Path, sample_file: Path, predictions: Mapping[str, ArrayLike], decimals: int = 6) -> ChallengeReport:
    """Write predictions {unit: [rows, 2]} in the order and number of the sample file's rows, clipped to [-1, 1].

    `decimals`: 3 to 6. What was written is read back and checked (`validate`) before it appears, by one rename. Raises
    UserError where a row of the sample has no prediction or stands there twice: every such row is then explained in
    `<path>.problems.txt`, and nothing else is written, since a missing row would make the whole submission invalid.
    """
    text = _texts(predictions, decimals)
    lines, problems = [HEADER], []
    seen: dict[str, set[int]] = {}
    for number, (location, unit, frame) in enumerate(read_sample(sample_file), start=2):
        known = text.get(unit, [])
        problem = (
            "" if frame <= len(known) else f"unit {unit} has {len(known)} predicted rows" if known else f"unit {unit} is not predicted"
        )
        if frame in seen.setdefault(unit, set()):
            problem = "this frame is in the sample file twice"
        seen[unit].add(frame)
        if problem:
            problems.append(f"row {number}: {location}: {problem}")
        else:
            lines.append(f"{location},{known[frame - 1]}")
    if not seen:
        raise UserError(f"{sample_file} names no frame", UNCHANGED)
    explanation = path.with_name(f"{path.name}.problems.txt")
    if problems:
        raise _disagreement(sample_file, problems, explanation)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        validate(scratch, sample_file)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    explanation.unlink(missing_ok=True)  # of an earlier attempt
    left = {unit: len(text[unit]) - len(frames) for unit, frames in seen.items() if len(text[unit]) > len(frames)}
    return ChallengeReport(path, len(lines) - 1, len(seen), _clipped(predictions, seen), tuple(sorted(set(predictions) - set(seen))), left)


def validate(path: Path, sample_file: Path) -> int:
    """Check a submission against its sample file: header, same rows in the same order, two numbers in [-1, 1] each; returns the rows.

    Raises UserError that names the first row that is wrong.
    """
    with open(path, encoding="utf-8", newline="") as file:
        lines = file.read().split("\n")
    if lines[0] != HEADER or lines[-1]:
        raise UserError(f"{path} does not begin with `{HEADER}` and end with a newline", "Write it again.")
    rows = 0
    for rows, (row, wanted) in enumerate(zip_longest(lines[1:-1], read_sample(sample_file)), start=1):
        location, *numbers = row.split(",") if row is not None else [""]
        expected = wanted[0] if wanted is not None else ""
        if location != expected:
            raise UserError(f"row {rows} of {path} is `{location}`, in the sample file it is `{expected}`", "Write it again.")
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = []
        if len(values) != 2 or not all(-1 <= value <= 1 for value in values):  # a NaN is in no range
            raise UserError(f"row {rows} of {path} is `{row[:80]}`: not two numbers in [-1, 1]", "Write it again.")
    return rows


def write_units(folder: Path, predictions: Mapping[str, ArrayLike], decimals: int = 3) -> ChallengeReport:
    """Write predictions {unit: [rows, 2]} as the first two editions wanted them: `<folder>/<unit>.txt`, one `valence,arousal` per frame.

    Clipped to [-1, 1]. The folder appears by one rename. Raises UserError where it is there already, or as `write_challenge`.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already", "Remove it, or choose another folder.")
    text = _texts(predictions, decimals)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        scratch.mkdir()
        for unit, rows in text.items():
            (scratch / f"{unit}.txt").write_text("\n".join([UNIT_HEADER, *rows]) + "\n", encoding="utf-8", newline="\n")
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return ChallengeReport(folder, sum(map(len, text.values())), len(text), _clipped(predictions, text))


def _disagreement(sample_file: Path, problems: list[str], explanation: Path) -> UserError:
    explanation.parent.mkdir(parents=True, exist_ok=True)
    explanation.write_text("\n".join([f"{sample_file}: {len(problems)} rows cannot be filled", *problems]) + "\n", encoding="utf-8")
    rows = "1 row" if len(problems) == 1 else f"{len(problems)} rows"
    return UserError(
        f"{rows} of {sample_file} cannot be filled, the first is {problems[0].replace(': ', ', ', 1)}",
        f"All are in {explanation}. Predict every test unit (evaluate.test=true), packed with this sample file.",
    )


def _clipped(predictions: Mapping[str, ArrayLike], units: Mapping[str, object]) -> int:
    return sum(int((np.abs(np.asarray(predictions[unit])) > 1).sum()) for unit in units)


def _texts(predictions: Mapping[str, ArrayLike], decimals: int) -> dict[str, list[str]]:
    """The numbers of every row as text."""
    if not 3 <= decimals <= 6:
        raise UserError(f"{decimals} decimals", "Use 3 to 6.")
    return {unit: _rows(unit, np.asarray(va, np.float64), decimals) for unit, va in predictions.items()}


def _rows(unit: str, va: NDArray[np.float64], decimals: int) -> list[str]:
    if va.ndim != 2 or va.shape[1] != 2:
        raise UserError(f"predictions of unit {unit} are {va.shape}, not [rows, 2]", "Write them with evaluate.predict.")
    if not np.isfinite(va).all():
        raise UserError(f"a prediction of unit {unit} is not a number", "The model diverged: look at its training curve.")
    rounded = np.round(np.clip(va, -1, 1), decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    return [f"{v:.{decimals}f},{a:.{decimals}f}" for v, a in rounded]
