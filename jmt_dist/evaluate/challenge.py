"""The challenge's submission file: the sample file's rows, in its order, with our numbers (ABAW editions 3 and later)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jmt_dist.errors import UserError

HEADER = "image_location,valence,arousal"


@dataclass(frozen=True)
class ChallengeReport:
    """What was written: rows and units, how many numbers were clipped, and predicted units that the sample does not name."""

    path: Path
    rows: int
    units: int
    clipped: int
    unused: tuple[str, ...]


def read_sample(sample_file: Path) -> Iterator[tuple[str, str, int]]:
    """(image location, unit, frame) of each row of a sample file; frames count from 1.

    Raises UserError where the file is missing, has another header, or a row is not `<unit>/<number>.jpg,…`.
    """
    if not sample_file.is_file():
        raise UserError(f"there is no sample file {sample_file}", "It comes with the challenge's test set list.")
    with open(sample_file, encoding="utf-8-sig", newline=None) as file:
        header = file.readline().strip()
        if header.replace(" ", "") not in (HEADER, "image_location"):
            raise UserError(f"{sample_file} begins with `{header[:80]}`, not with `{HEADER}`", "Give the valence/arousal sample file.")
        for number, line in enumerate(file, start=2):
            if not line.strip():
                continue
            location = line.split(",", 1)[0].strip()
            found = re.fullmatch(r"(.+)/0*([1-9]\d*)\.\w+", location)
            if found is None:
                what = f"{sample_file}, line {number}: `{location[:80]}` is not <unit>/<frame>.jpg"
                raise UserError(what, "Give an unchanged sample file.")
            yield location, found[1], int(found[2])


def write_challenge(path: Path, sample_file: Path, predictions: Mapping[str, ArrayLike], decimals: int = 6) -> ChallengeReport:
    """Write predictions {unit: [rows, 2]} in the order and number of the sample file's rows, clipped to [-1, 1].

    `decimals`: 3 to 6. The file appears by one rename, and only complete. Raises UserError where a unit or frame of the
    sample has no prediction, or a prediction is not a number: a missing row would make the whole submission invalid.
    """
    if not 3 <= decimals <= 6:
        raise UserError(f"{decimals} decimals", "Use 3 to 6.")
    text: dict[str, list[str]] = {}
    used: dict[str, int] = {}
    values = {name: np.asarray(va, np.float64) for name, va in predictions.items()}
    lines = [HEADER]
    missing: dict[str, int] = {}
    for location, unit, frame in read_sample(sample_file):
        if unit not in text:
            text[unit] = _rows(unit, values[unit], decimals) if unit in values else []
        if frame > len(text[unit]):
            missing[unit] = missing.get(unit, 0) + 1
            continue
        used[unit] = used.get(unit, 0) + 1
        lines.append(f"{location},{text[unit][frame - 1]}")
    if missing:
        name, count = next(iter(missing.items()))
        what = f"unit {name} lacks {count} frames" if name in values else f"unit {name} is not predicted"
        more = f", and {len(missing) - 1} more units" if len(missing) > 1 else ""
        raise UserError(f"{what}{more} of {sample_file}", "Predict every test unit (evaluate.test=true), packed with this sample file.")
    if not used:
        raise UserError(f"{sample_file} names no frame", "Give an unchanged sample file.")
    clipped = sum(int((np.abs(values[unit]) > 1).sum()) for unit in used)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return ChallengeReport(path, len(lines) - 1, len(used), clipped, tuple(sorted(set(values) - set(used))))


def _rows(unit: str, va: NDArray[np.float64], decimals: int) -> list[str]:
    if va.ndim != 2 or va.shape[1] != 2:
        raise UserError(f"predictions of unit {unit} are {va.shape}, not [rows, 2]", "Write them with evaluate.predict.")
    if not np.isfinite(va).all():
        raise UserError(f"a prediction of unit {unit} is not a number", "The model diverged: look at its training curve.")
    rounded = np.round(np.clip(va, -1, 1), decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    return [f"{v:.{decimals}f},{a:.{decimals}f}" for v, a in rounded]
