"""Finds the pieces of Aff-Wild2 on disk, however a release or a user has named and nested them.

    batch1/, batch2/, …                      videos, .mp4 or .avi
    cropped_aligned/<unit>/00001.jpg         face crops; also cropped_aligned_new_50_vids/
    annotations/VA_Estimation_Challenge/{Train_Set,Validation_Set}/<unit>.txt      or
    annotations/VA_Set/{Training_Set,Validation_Set}/<unit>.txt                    or the two folders directly
    names_of_videos_in_each_test_set/Valence_Arousal_Estimation_Challenge_test_set_release.txt
    test_set_examples/CVPR_6th_ABAW_VA_test_set_example.txt      (or …_sample.txt)

All of it may lie in the root or up to three folders below. What contradicts itself is settled by a rule and
noted as a Problem; nothing is settled by the order in which a file system lists its folders.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jmt_dist.affwild2.labels import count_rows, read_text
from jmt_dist.affwild2.release import SPLITS, Counts, name_release
from jmt_dist.errors import UserError

MEDIA = (".avi", ".mp4")
SIDES = ("_left", "_right")
DEPTH = 4  # of the folders that hold label files, from the root

TRAIN_FOLDERS = {"train_set", "training_set", "train"}
VALIDATION_FOLDERS = {"validation_set", "val_set", "validation", "val"}
OTHER_TASK = re.compile(r"(au|expr|expression|mtl)(?![a-z])|(au|expression)set$", re.IGNORECASE)  # folders of the other challenges
TEST_LIST = re.compile(r"(?:valence_arousal|va(?=_)).*test_set_release.*\.txt", re.IGNORECASE)
SAMPLE_FILE = re.compile(r"(?:.*_)?(?:valence_arousal|va)_.*test_set_(?:example|sample).*\.txt", re.IGNORECASE)


@dataclass(frozen=True)
class Unit:
    """One annotated face track. `rows` is its length N: label rows, or for a test unit rows of the sample file."""

    name: str
    video: str  # the physical file's stem: two people of one video share it
    split: str  # train, validation or test
    labels: Path | None
    crops: tuple[Path, ...]  # crop folders, in the order in which they are asked for a frame
    media: Path | None
    rows: int


@dataclass(frozen=True)
class Problem:
    """A contradiction in the folder and the rule that settled it. `unit` is empty where it concerns the dataset.

    `what` names its kind, as the packing report counts them.
    """

    unit: str
    sentence: str
    what: str = "dataset folder"


@dataclass(frozen=True)
class Dataset:
    """The units under a root, sorted by name, and what is to be known of the folder as a whole."""

    root: Path
    release: str
    units: tuple[Unit, ...]
    problems: tuple[Problem, ...] = ()
    sample_file: Path | None = None  # fixes order and count of the challenge file's rows


@dataclass
class _Found:
    """Folders and files of interest, in the order of a sorted walk."""

    annotations: list[Path] = field(default_factory=list)  # folders with a train or a validation folder in them
    batches: list[Path] = field(default_factory=list)
    crops: list[Path] = field(default_factory=list)
    test_lists: list[Path] = field(default_factory=list)
    sample_files: list[Path] = field(default_factory=list)
    closed: list[Path] = field(default_factory=list)  # folders that cannot be listed, lost+found say


def find_dataset(root: Path) -> Dataset:
    """The dataset under `root`.

    Raises UserError where the folder is missing, where neither labels nor a test list are in it, and where a
    text file in it cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        sentence = f"{root} is a file, not a folder" if root.exists() else f"there is no folder {root}"
        raise UserError(sentence, "Give the folder that holds batch1, cropped_aligned and annotations.")
    found = _Found()
    _walk(root, _entries(root), 0, found)
    problems = [Problem("", f"{_short(root, path)} cannot be listed", "folder that cannot be listed") for path in found.closed]
    labels = _labels(root, found, problems)
    test, sample_file = _test_units(root, found, problems)
    if not labels and not test:
        raise UserError(
            f"no valence-arousal labels are in {root}",
            "It should hold VA_Estimation_Challenge/Train_Set and Validation_Set with one .txt per unit, at most three folders down.",
        )
    media = _media(root, found, problems)
    for missing, what in ((not found.batches, "batch1, batch2, … with the videos"), (not found.crops, "cropped_aligned")):
        if missing:
            problems.append(Problem("", f"there is no folder {what}"))
    units = []
    for name in sorted({*labels, *test}):
        split, path = labels.get(name, ("test", None))
        if name in test and path is not None:
            problems.append(
                Problem(name, f"is in the test list and has labels in {_short(root, path)}: taken as a test unit", "labels of a test unit")
            )
            split, path = "test", None
        video = video_of(name, media)
        crops = _crop_folders(found.crops, name)
        try:
            rows = test[name] if path is None else count_rows(path)
        except UserError as error:  # costs this unit, not the dataset: packing reads the file again and names the unit
            problems.append(Problem(name, error.sentence, "unreadable label file"))
            rows = 0
        else:
            if path is not None and not rows:
                problems.append(Problem(name, f"has no label rows in {_short(root, path)}", "empty label file"))
        units.append(Unit(name, video, split, path, crops, media.get(video), rows))
    return Dataset(root, _release(root, units), tuple(units), tuple(problems), sample_file)


def _crop_folders(folders: list[Path], unit: str) -> tuple[Path, ...]:
    try:
        return tuple(folder / unit for folder in folders if (folder / unit).is_dir())
    except OSError as error:  # may be listed but not entered: every unit would seem to have no crops
        raise UserError(f"{error.filename} cannot be read: {error.strerror}", "Check the permissions of the folders above it.") from None


def video_of(unit: str, media: dict[str, Path]) -> str:
    """The video a unit belongs to: itself if a video has its name, else its name without `_left` or `_right` at the end."""
    if unit not in media:
        for side in SIDES:
            if unit.endswith(side) and len(unit) > len(side):
                return unit.removesuffix(side)
    return unit


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key in which batch2 comes before batch10; never equal for different names."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]+)", name) if part], name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Entries of a folder without hidden ones (.DS_Store, ._x.mp4), by name. Raises UserError where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: natural(entry.name))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}", "Check the folder's permissions.") from None


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is, or links to, a folder; a link to itself is neither folder nor file."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _walk(root: Path, entries: list[os.DirEntry[str]], depth: int, found: _Found) -> None:
    """Collect what is of interest; crop folders (three million files) and label folders are not entered.

    A folder that cannot be listed is noted, unless it is one of those that are read: raises UserError for these.
    """
    for entry in entries:
        path, name = Path(entry.path), entry.name.lower()
        if not _is_dir(entry):
            if TEST_LIST.fullmatch(name):
                found.test_lists.append(path)
            elif SAMPLE_FILE.fullmatch(name):
                found.sample_files.append(path)
        elif name == "cropped_aligned" or name.startswith("cropped_aligned_"):
            nested = [Path(inner.path) for inner in _entries(path) if inner.name.lower().startswith("cropped_aligned") and _is_dir(inner)]
            found.crops += [path, *nested]  # unpacking an archive into a folder of its own name nests it
        elif re.fullmatch(r"batch_?\d+", name):
            found.batches.append(path)
        elif name in TRAIN_FOLDERS | VALIDATION_FOLDERS:
            folder = path.parent
            other = any(OTHER_TASK.match(part) for part in folder.relative_to(root).parts)
            if folder not in found.annotations and not other and _label_files(path):
                found.annotations.append(folder)
        elif depth + 1 < DEPTH and not name.startswith("cropped"):
            try:
                inside = _entries(path)
            except UserError:
                found.closed.append(path)
            else:
                _walk(root, inside, depth + 1, found)


def _label_files(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder) if entry.name.lower().endswith(".txt") and _is_file(entry)]


def _short(root: Path, path: Path) -> str:
    return str(path.relative_to(root))


def _labels(root: Path, found: _Found, problems: list[Problem]) -> dict[str, tuple[str, Path]]:
    """Label file and split of every labelled unit, from the one annotation folder whose name speaks for it most.

    Of folders whose names speak alike, that of the newest edition (`6th ABAW Annotations/…`): their labels differ.
    """

    def rank(folder: Path) -> tuple[bool, bool, int, int]:
        name = folder.name.lower()
        return not name.startswith("va"), not name.startswith("va_estimation"), -_edition(_short(root, folder)), len(folder.parts)

    labels: dict[str, tuple[str, Path]] = {}
    folders = sorted(found.annotations, key=rank)  # stable: equals stay in the order of the walk
    for ignored in folders[1:]:
        sentence = f"labels in {_short(root, ignored)} are not read: those in {_short(root, folders[0])} are"
        problems.append(Problem("", sentence, "second annotation folder"))
    for entry in _entries(folders[0]) if folders else []:
        name = entry.name.lower()
        if not _is_dir(entry) or name not in TRAIN_FOLDERS | VALIDATION_FOLDERS:
            continue
        split = "train" if name in TRAIN_FOLDERS else "validation"
        for path in _label_files(Path(entry.path)):
            unit = path.name[:-4]
            _, first = labels.setdefault(unit, (split, path))
            if first != path:
                sentence = f"has labels in {_short(root, first)} and {_short(root, path)}: the first is taken"
                problems.append(Problem(unit, sentence, "duplicate labels"))
    return labels


def _media(root: Path, found: _Found, problems: list[Problem]) -> dict[str, Path]:
    """Stem to media file, over all batch folders and the folders in them; the first of a stem is taken."""
    media: dict[str, Path] = {}
    for path in (path for batch in found.batches for path in _files(batch)):
        stem, extension = os.path.splitext(path.name)
        if extension.lower() not in MEDIA:
            continue
        if stem in media:
            sentence = f"has videos {_short(root, media[stem])} and {_short(root, path)}: the first is taken"
            problems.append(Problem(stem, sentence, "duplicate videos"))
        else:
            media[stem] = path
    return media


def _files(folder: Path, depth: int = 0) -> Iterator[Path]:
    for entry in _entries(folder):
        if _is_file(entry):
            yield Path(entry.path)
        elif depth < DEPTH and _is_dir(entry):
            yield from _files(Path(entry.path), depth + 1)


def _edition(name: str) -> int:
    """The number of the challenge's edition that a name tells (`CVPR_6th_ABAW_…`, `10th ABAW Annotations`), 0 where it tells none."""
    return max((int(number) for number in re.findall(r"([0-9]+)(?:st|nd|rd|th)(?![a-z])", name.lower())), default=0)


def _newest(root: Path, paths: list[Path], what: str, problems: list[Problem]) -> Path | None:
    """Of several files of one kind that of the newest edition (`CVPR_6th_…`, `ICCV_9th_…`); of one edition the last by name."""

    def age(path: Path) -> tuple[Any, ...]:
        return _edition(path.name), natural(str(path))

    paths = sorted(paths, key=age)
    for ignored in paths[:-1]:
        problems.append(
            Problem("", f"{what} {_short(root, ignored)} is not read: {_short(root, paths[-1])} is", "several editions of a file")
        )
    return paths[-1] if paths else None


def _test_units(root: Path, found: _Found, problems: list[Problem]) -> tuple[dict[str, int], Path | None]:
    """Rows of every test unit. The sample file decides; units that only the list has keep 0 rows and a note."""
    test_list = _newest(root, found.test_lists, "test list", problems)
    sample = _newest(root, found.sample_files, "sample file", problems)
    rows = sample_rows(sample) if sample else Counter[str]()
    listed = [line.strip() for line in read_text(test_list).splitlines()] if test_list else []
    names = dict.fromkeys(name.removesuffix(".txt") for name in listed if name)
    if sample and test_list:
        for name in sorted(rows.keys() - names.keys()):
            sentence = f"is in {_short(root, sample)} but not in the test list: taken as a test unit"
            problems.append(Problem(name, sentence, "test unit not in the list"))
    for name in sorted(names.keys() - rows.keys()):
        sentence = "is in the test list but in no sample file: its number of rows is unknown"
        problems.append(Problem(name, sentence, "test unit not in the sample file"))
    return {name: rows.get(name, 0) for name in [*names, *rows]}, sample


def sample_rows(path: Path) -> Counter[str]:
    """Rows per unit of a sample file, whose lines are `<unit>/%05d.jpg,valence,arousal` after a header, in its order of units."""
    rows: Counter[str] = Counter()
    for line in read_text(path).splitlines():
        unit, slash, _ = line.partition("/")
        if slash:
            rows[unit.strip()] += 1
    return rows


def _release(root: Path, units: list[Unit]) -> str:
    if (root / "fixture.json").is_file():
        return "fixture"
    rows = {split: [unit.rows for unit in units if unit.split == split] for split in SPLITS}
    return name_release({split: Counts(len(found), sum(found)) for split, found in rows.items()})
