"""Packing, pass 1: what is needed of one video, decoded once and laid down for the shards to slice (DESIGN section 6).

<work>/videos/<video>/pcm.npy           int16 [samples] mono at 44.1 kHz, mapped by pass 2 and deleted when its shards are finished
                      times.npy         float64 [frames] timestamps in seconds
                      <unit>.va.npy     float32 [N, 2]
                      <unit>.crops.npy  uint8 [N]: 0 = no crop, k = in the unit's k-th crop folder
                      video.json        the result; with it the folder appears, by one rename
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jmt_dist.affwild2.folds import summarise
from jmt_dist.affwild2.labels import read_table
from jmt_dist.affwild2.layout import Unit
from jmt_dist.affwild2.media import fallback_timestamps
from jmt_dist.data.geometry import RATE, SEGMENT
from jmt_dist.data.pack_media import Media, Noter, read_media
from jmt_dist.data.sample import escape
from jmt_dist.errors import UserError

FEWER, MORE = -3, 2  # rows minus frames that are normal (DESIGN section 5)
RESULT, SOUND = "video.json", "pcm.npy"
_CROP = re.compile(r"(\d{5,})\.jpg")


@dataclass(frozen=True)
class Note:
    """Something met on the way that a rule settled: `what` is counted in the report, `detail` belongs to the unit."""

    unit: str
    what: str
    detail: str


@dataclass(frozen=True)
class UnitResult:
    """One unit after pass 1; `invalid` counts its rows marked -5, `error` says why it is left out."""

    name: str
    rows: int = 0
    valid: int = 0
    invalid: int = 0
    histogram: tuple[int, ...] = ()
    crops: int = 0
    notes: tuple[Note, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class VideoResult:
    """One video after pass 1: `seconds` of sound kept, `error` says why its container gave nothing, `source` as of `state_of`."""

    video: str
    frames: int
    seconds: float
    units: tuple[UnitResult, ...]
    error: str = ""
    source: str = ""


@dataclass(frozen=True)
class VideoTask:
    """What a process of pass 1 is given."""

    work: Path
    video: str
    units: tuple[Unit, ...]


def video_folder(work: Path, video: str) -> Path:
    """Where pass 1 lays down a video."""
    return work / "videos" / escape(video)


def prepare_video(task: VideoTask) -> VideoResult:
    """Do pass 1 for a video, or read what an earlier run did. Errors of units stand in the result; none is raised for them."""
    folder = video_folder(task.work, task.video)
    done = read_result(task)
    if done is not None and not done.error and not any(unit.error for unit in done.units):  # an error may have been put right since
        return done
    partial = folder.with_name(f"{folder.name}.partial")
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    try:
        return _lay_down(task, folder, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _lay_down(task: VideoTask, folder: Path, partial: Path) -> VideoResult:
    partial.mkdir(parents=True)
    state = state_of(task.units)  # before anything is read: what changes meanwhile is noticed the next time
    media = read_media(task.units[0].media)
    units = tuple(_prepare_unit(unit, media, partial, len(task.units)) for unit in task.units)
    require_source(task.units)
    times = media.times if media.times is not None else fallback_timestamps(max(1, *(u.rows for u in units), 1))
    np.save(partial / "times.npy", times)
    np.save(partial / SOUND, media.pcm)
    frames = 0 if media.times is None else len(media.times)
    result = VideoResult(task.video, frames, len(media.pcm) / RATE, units, media.error, state)
    (partial / RESULT).write_text(json.dumps(asdict(result)), encoding="utf-8")
    os.replace(partial, folder)
    return result


def require_source(units: Sequence[Unit]) -> None:
    """Raises UserError where a file or folder that the search for the dataset found is there no more.

    Without this a file system that goes away would look like a dataset of unreadable videos and missing crops.
    """
    for unit in units:
        for path in (unit.labels, unit.media, *unit.crops):
            if path is not None and not path.exists():
                raise gone(path)


def gone(path: Path | str) -> UserError:
    """The error of a source that vanishes while it is read."""
    return UserError(f"{path} was there and is gone", "Is the dataset still mounted? The same command goes on where it stopped.")


def state_of(units: Sequence[Unit]) -> str:
    """sha256 of the units of a video and of place, size and time of their files and crop folders.

    What pass 1 laid down is of use as long as this is the same: a video that was put in its place, crops that were added or
    a sample file that came later must not be missed because an earlier run was interrupted.
    """
    facts = []
    for unit in units:
        facts.append(repr((unit.name, unit.split, unit.rows)))
        for path in (unit.labels, unit.media, *unit.crops):
            if path is not None and path.exists():
                found = path.stat()
                facts.append(repr((os.fspath(path), found.st_size, found.st_mtime_ns)))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def read_result(task: VideoTask) -> VideoResult | None:
    """What an earlier run found of a video, if it was about these units and their files are what they were."""
    names = {unit.name for unit in task.units}
    try:
        data = json.loads((video_folder(task.work, task.video) / RESULT).read_text(encoding="utf-8"))
        if data["source"] != state_of(task.units):
            return None
        units = []
        for unit in data["units"]:
            notes = tuple(Note(**note) for note in unit["notes"])
            units.append(UnitResult(**{**unit, "histogram": tuple(unit["histogram"]), "notes": notes}))
        return VideoResult(**{**data, "units": tuple(units)}) if {unit.name for unit in units} == names else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prepare_unit(unit: Unit, media: Media, folder: Path, people: int) -> UnitResult:
    notes: list[Note] = []

    def note(what: str, detail: str) -> None:
        notes.append(Note(unit.name, what, detail))

    for what, detail in media.notes:
        note(what, detail)
    _note_names(unit, people, note)
    try:
        va, rows, invalid = _labels(unit, media, note)
    except UserError as error:
        return UnitResult(unit.name, notes=tuple(notes), error=error.sentence)
    if 0 < rows < SEGMENT:
        note("shorter than one segment", f"{rows} rows")
    error_text = _reason_to_omit(unit, rows, media, note)
    try:
        crops = crop_inventory(unit.crops, rows, note)
    except OSError as error:
        crops, reason = np.zeros(rows, np.uint8), f"{error.filename} cannot be read: {error.strerror}"
        error_text = _unless_test(unit, reason, note)
    else:
        if unit.crops and rows and not error_text and not crops.any():  # black from end to end would teach its labels all the same
            error_text = _unless_test(unit, "its folder of face crops holds none of its frames", note)
    name = escape(unit.name)
    np.save(folder / f"{name}.va.npy", va)
    np.save(folder / f"{name}.crops.npy", crops)
    summary = summarise(unit.name, unit.video, unit.split, va)
    return UnitResult(unit.name, rows, summary.valid, invalid, summary.histogram, int((crops > 0).sum()), tuple(notes), error_text)


def _labels(unit: Unit, media: Media, note: Noter) -> tuple[NDArray[np.float32], int, int]:
    """(labels [N, 2], N, rows marked -5). A test unit has no labels; without a sample file the frames of its video count."""
    if unit.labels is None:
        rows = unit.rows
        if not rows and media.times is not None:
            rows = len(media.times)
            note("length not in a sample file", f"{rows} frames of the video are taken as rows")
        return np.full((rows, 2), np.nan, np.float32), rows, 0
    table = read_table(unit.labels)
    for count, what in ((table.invalid, "rows marked -5"), (table.nan, "rows that say NaN"), (table.out_of_range, "rows outside [-1, 1]")):
        if count:
            note(what, f"{count} of {len(table.va)}")
    if not table.had_header:
        note("label file without a header", unit.labels.name)
    if table.crlf:
        note("label file with CRLF", unit.labels.name)
    return table.va, len(table.va), table.invalid


def _note_names(unit: Unit, people: int, note: Noter) -> None:
    """Names and links that a rule settles."""
    if people > 1 or unit.name != unit.video:
        note("several people in one video", f"{people} units of {unit.video}")
    if escape(unit.name) != unit.name:
        note("name escaped in keys", escape(unit.name))
    links = [path.name for path in (unit.labels, unit.media, *unit.crops) if path is not None and path.is_symlink()]
    if links:
        note("symbolic links", ", ".join(links))


def _reason_to_omit(unit: Unit, rows: int, media: Media, note: Noter) -> str:
    """Why a unit is left out, or "". A test unit never is: what would omit another is noted."""
    reason = ""
    difference = 0 if media.times is None else rows - len(media.times)
    if not rows:
        reason = "it has no rows"
    elif not unit.crops:
        reason = "it has no folder of face crops"
    elif not FEWER <= difference <= MORE:
        reason = f"{rows} rows, but the video has {len(media.times if media.times is not None else ())} frames"
    elif difference:
        note("rows differ from frames", f"{difference:+d}")
    return _unless_test(unit, reason, note)


def _unless_test(unit: Unit, reason: str, note: Noter) -> str:
    if reason and unit.split == "test":
        note("test unit kept in spite of an error", reason)
        return ""
    return reason


def crop_inventory(folders: Sequence[Path], rows: int, note: Noter) -> NDArray[np.uint8]:
    """uint8 [rows]: in which of `folders` (from 1; the first wins) frame 1 .. rows has `%05d.jpg`; 0 = none."""
    found = np.zeros(rows, np.uint8)
    outside = odd = 0
    for place, folder in reversed(list(enumerate(folders, start=1))):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                match = _CROP.fullmatch(entry.name) if not entry.is_symlink() or os.path.isfile(entry.path) else None  # dangling
                number = int(match[1]) if match else 0
                if match is None or entry.name != f"{number:05d}.jpg":
                    odd += 1
                elif 1 <= number <= rows:
                    found[number - 1] = place
                else:
                    outside += 1
    missing = int((found == 0).sum())
    for count, what in ((missing, "frames without a crop"), (outside, "crops outside the rows"), (odd, "other files in the crop folder")):
        if count:
            note(what, str(count) if what != "frames without a crop" else f"{count} of {rows}")
    if len(folders) == 1 and folders[0].parent.name != "cropped_aligned":
        note("crops in a further folder", folders[0].parent.name)
    if len(folders) > 1:
        note("several crop folders", ", ".join(folder.parent.name for folder in folders))
    return found
