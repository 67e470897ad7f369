"""From predictions per clip to one prediction per source frame, and the files that hold them (DESIGN section 4)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jmt_dist.data.geometry import CLIPS, LABEL_BACK, OFFSETS, SEGMENT, STEP, end_frames
from jmt_dist.errors import UserError

Rows = NDArray[np.float32]
COLUMNS = ("unit", "frame", "valence", "arousal", "valence_label", "arousal_label")


@dataclass(frozen=True)
class UnitRows:
    """A unit to predict: its index in the shards' manifest (first number of `id`), its name, its number of rows."""

    index: int
    name: str
    rows: int


@dataclass(frozen=True)
class UnitPrediction:
    """One unit's predictions [rows, 2] and labels [rows, 2] (NaN = none), valence then arousal; row i is frame i+1."""

    va: Rows
    labels: Rows


def dense(
    va: ArrayLike, ids: ArrayLike, offsets: Sequence[int], units: Iterable[UnitRows], label: Literal["end", "middle"] = "end"
) -> dict[str, Rows]:
    """One prediction [rows, 2] for every frame of every unit.

    `va` [S, O, 8, 2]: predictions of S samples at O offsets, for 8 clips; `ids` [S, 4]: unit index, m, p, strip mode;
    `offsets` [O]. The prediction of clip (q, j) belongs to the frame it ends at (geometry.clip_end), or with `label="middle"`
    to its fifth of eight; frames outside the unit are left out. With all 8 offsets every frame is predicted exactly once (but for
    the last 12 of a unit in the latter case); else the frames between are interpolated linearly, and those before the first or
    after the last take the nearest.

    Raises UserError: a unit without any prediction (a test unit too), a prediction that is not a number, a sample of
    a unit that is not asked for, a frame predicted twice.
    """
    values, keys = np.asarray(va, np.float32), np.asarray(ids, np.int64)
    if values.shape != (len(keys), len(offsets), CLIPS, 2):
        raise ValueError(f"predictions {values.shape} for {len(keys)} samples and {len(offsets)} offsets")
    wanted = list(units)
    strangers = set(np.unique(keys[:, 0]).tolist()) - {unit.index for unit in wanted}
    if strangers:
        raise UserError(
            f"predictions name unit {min(strangers)}, which is not asked for", "Use the folds that these predictions were made with."
        )
    clip = np.asarray(offsets, np.int64)[:, None] + OFFSETS * np.arange(CLIPS)  # [O, 8]
    ends = end_frames(0, 0)[clip][None] + (SEGMENT * keys[:, 1] + keys[:, 2])[:, None, None]  # [S, O, 8]
    ends -= STEP * LABEL_BACK[label]
    order = np.argsort(keys[:, 0], kind="stable")
    sorted_units = keys[order, 0]
    result: dict[str, Rows] = {}
    for unit in wanted:
        mine = order[np.searchsorted(sorted_units, unit.index, "left") : np.searchsorted(sorted_units, unit.index, "right")]
        result[unit.name] = _fill(unit, ends[mine].ravel(), values[mine].reshape(-1, 2))
    return result


def _fill(unit: UnitRows, ends: NDArray[np.int64], va: Rows) -> Rows:
    inside = (ends >= 1) & (ends <= unit.rows)
    frames, va = ends[inside], va[inside]
    if not len(frames):
        raise UserError(f"unit {unit.name} has no prediction", "Pack the shards again: every unit must have at least one sample.")
    if not np.isfinite(va).all():
        raise UserError(f"predictions of unit {unit.name} are not numbers", "The model diverged: look at its training curve.")
    if len(np.unique(frames)) != len(frames):
        raise UserError(f"a frame of unit {unit.name} is predicted twice", "Give every sample and every offset once.")
    order = np.argsort(frames)
    grid = np.arange(1, unit.rows + 1)
    return np.stack([np.interp(grid, frames[order], va[order, k]) for k in range(2)], axis=1).astype(np.float32)


def write_predictions(path: Path, predictions: Mapping[str, ArrayLike], labels: Mapping[str, ArrayLike | None]) -> None:
    """Write predictions {unit: [rows, 2]} and labels {unit: [rows, 2] or None} as Parquet, by one rename.

    Columns: unit (string), frame (int32, from 1), valence, arousal, valence_label, arousal_label (float32, NaN = none).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    empty = np.zeros((0, 2), np.float32)
    codes, frames = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    va, truth = [empty], [empty]
    for code, (name, values) in enumerate(predictions.items()):
        rows = np.asarray(values, np.float32)
        known = labels.get(name)
        label = np.full(rows.shape, np.nan, np.float32) if known is None else np.asarray(known, np.float32)
        if label.shape != rows.shape:
            raise ValueError(f"unit {name}: {len(label)} labels for {len(rows)} predictions")
        codes.append(np.full(len(rows), code, np.int32))
        frames.append(np.arange(1, len(rows) + 1, dtype=np.int32))
        va.append(rows)
        truth.append(label)
    unit = pa.DictionaryArray.from_arrays(np.concatenate(codes), pa.array(list(predictions), pa.string()))
    numbers = np.concatenate([np.concatenate(va), np.concatenate(truth)], axis=1)
    table = pa.table(dict(zip(COLUMNS, [unit, np.concatenate(frames), *numbers.T], strict=True)))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, scratch, compression="zstd")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def read_predictions(path: Path) -> dict[str, UnitPrediction]:
    """Read a file of `write_predictions`, in its order. Raises UserError if it is missing, not such a file, or has gaps."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"there are no predictions {path}", "Run the evaluate stage of this fold first.")
    try:
        table = pq.read_table(path, columns=list(COLUMNS))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a predictions file: {' '.join(str(error).split())}", "Run the evaluate stage again.") from None
    if not table.num_rows:
        return {}
    unit = table["unit"].cast(pa.string()).combine_chunks().dictionary_encode()
    codes, names = unit.indices.to_numpy(zero_copy_only=False), unit.dictionary.to_pylist()
    number = table["frame"].to_numpy()
    columns = [table[name].to_numpy() for name in COLUMNS[2:]]
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1, [len(codes)]])
    result: dict[str, UnitPrediction] = {}
    for start, stop in pairwise(bounds):
        name = names[codes[start]]
        if name in result or not np.array_equal(number[start:stop], np.arange(1, stop - start + 1)):
            raise UserError(f"{path}: frames of unit {name} are not 1, 2, 3, …", "Run the evaluate stage again.")
        part = [column[start:stop].astype(np.float32) for column in columns]
        result[name] = UnitPrediction(np.stack(part[:2], axis=1), np.stack(part[2:], axis=1))
    return result
