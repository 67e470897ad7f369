"""Verification of a shard folder: every promise of the sample contract, checked from the bytes (DESIGN section 6)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jmt_dist.affwild2.layout import Unit, find_dataset
from jmt_dist.config import VerifyOptions
from jmt_dist.data.geometry import LEAD, SEGMENT, SIZE, STRIP, WINDOW, samples_of, strip_frames
from jmt_dist.data.jpeg import StripError
from jmt_dist.data.progress import Progress, in_processes
from jmt_dist.data.sample import Sample, decode_audio, key, parse_key
from jmt_dist.data.shards import MANIFEST, Manifest, PackedUnit, Shard, read_manifest
from jmt_dist.data.strip import MODES, decode, split
from jmt_dist.data.tars import Entry, index_text, read_entry, scan_tar
from jmt_dist.data.verify_folds import verify_folds
from jmt_dist.data.verify_source import compare_sample, compare_units


@dataclass(frozen=True)
class Defect:
    """One thing that is not as promised: in which file, in which sample ("" = the file as a whole), what."""

    file: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}{f' {self.key}' if self.key else ''}: {self.what}"


@dataclass(frozen=True)
class Verified:
    """What a verification came to; `compared` counts samples held against their source files."""

    samples: int
    compared: int
    defects: tuple[Defect, ...]


@dataclass(frozen=True)
class ShardTask:
    """What a process is given; `source` has the dataset's units by name, empty where nothing is compared."""

    folder: Path
    shard: Shard
    audio: str
    units: tuple[PackedUnit, ...]
    source: Mapping[str, Unit]


@dataclass(frozen=True)
class ShardVerdict:
    """Keys of a shard (none where it cannot be read), how many samples were compared with their source, and its defects."""

    shard: str
    keys: tuple[str, ...]
    compared: int
    defects: tuple[Defect, ...]


def verify(options: VerifyOptions, say: Callable[[str], None] = print) -> Verified:
    """Check a shard folder, against its dataset too where `options.against` names one.

    Raises UserError where there is no manifest to check against, or no dataset.
    """
    manifest = read_manifest(Path(options.shards))
    source: dict[str, Unit] = {}
    if options.against:
        source = {unit.name: unit for unit in find_dataset(Path(options.against)).units}
    say(f"{manifest.folder}: {manifest.samples:,} samples in {len(manifest.shards)} shards, release {manifest.release}")
    tasks = []
    for shard in manifest.shards:
        tasks.append(ShardTask(manifest.folder, shard, str(manifest.options.get("audio")), manifest.units, source))
    verdicts: list[ShardVerdict] = []
    with Progress("verify", manifest.samples, "samples") as progress:
        for verdict in in_processes(verify_shard, tasks, options.workers):
            verdicts.append(verdict)
            progress.advance(len(verdict.keys))
    verdicts.sort(key=lambda verdict: verdict.shard)
    defects = [defect for verdict in verdicts for defect in verdict.defects]
    defects += _whole(manifest, verdicts)
    if source:
        defects += [Defect(MANIFEST, "", what) for what in compare_units(manifest, source, options.against)]
    defects += [Defect(file, "", what) for file, what in verify_folds(manifest)]
    return Verified(sum(len(v.keys) for v in verdicts), sum(v.compared for v in verdicts), tuple(defects))


def remedies(defects: Sequence[Defect]) -> list[str]:
    """What to do about defects: a line for each kind of file that is named."""
    files = {defect.file for defect in defects}
    folds = sorted({"/".join(file.split("/")[:2]) for file in files if "/" in file})
    shards = sorted(file for file in files if "/" not in file and file != MANIFEST)
    lines = []
    if shards:
        lines.append("Remove the tars and indexes named and run pack_shards.py again: only they are made anew.")
    if folds:
        lines.append(f"Remove the folder {' and '.join(folds)} and run pack_shards.py again with its folds options: no shard is touched.")
    if MANIFEST in files and not shards:
        lines.append(f"{MANIFEST} does not fit its shards or the dataset: restore it, or pack into a new folder.")
    return lines


def _whole(manifest: Manifest, verdicts: Sequence[ShardVerdict]) -> list[Defect]:
    """What only all shards together show: samples missing, doubled, or of no unit; files of no shard."""
    found = Counter(key for verdict in verdicts for key in verdict.keys)
    wanted = {key(unit.name, m, p) for unit in manifest.units for m, p in samples_of(unit.rows)}
    missing = sorted(wanted - found.keys())
    unread = {verdict.shard for verdict in verdicts if not verdict.keys}
    if len(missing) == sum(shard.samples for shard in manifest.shards if shard.name in unread):
        missing = []  # they are in the tars that cannot be read: one defect each is enough
    defects = [Defect(MANIFEST, name, "sample is missing from the shards") for name in missing]
    defects += [Defect(MANIFEST, name, "sample of no unit of the manifest") for name in sorted(found.keys() - wanted)]
    defects += [Defect(MANIFEST, name, f"sample is there {count} times") for name, count in sorted(found.items()) if count > 1]
    known = {shard.name for shard in manifest.shards} | {shard.index for shard in manifest.shards}
    there = sorted(path.name for pattern in ("*.tar", "*.idx") for path in manifest.folder.glob(pattern))
    return defects + [Defect(name, "", "file of no shard of the manifest") for name in there if name not in known]


def verify_shard(task: ShardTask) -> ShardVerdict:
    """Check one tar, its index and every sample in it."""
    name, path = task.shard.name, task.folder / task.shard.name
    defects: list[Defect] = []
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != task.shard.sha256:
            defects.append(Defect(name, "", "sha256 is not that of the manifest"))
        entries = scan_tar(path)
    except (OSError, ValueError) as error:
        return ShardVerdict(name, (), 0, (*defects, Defect(name, "", f"cannot be read: {error}")))
    if len(entries) != task.shard.samples:
        defects.append(Defect(name, "", f"{len(entries)} samples, {task.shard.samples} in the manifest"))
    try:
        if (task.folder / task.shard.index).read_text(encoding="ascii") != index_text(entries):
            defects.append(Defect(task.shard.index, "", "not the index of its tar"))
    except (OSError, UnicodeDecodeError) as error:
        defects.append(Defect(task.shard.index, "", f"cannot be read: {error}"))
    compared = 0
    units = {unit.name: (index, unit) for index, unit in enumerate(task.units)}
    with path.open("rb") as file:
        for entry in entries:
            members = read_entry(file, entry)
            problems = list(check_sample(entry, members, units, task.audio))
            unit = _source_of(entry, task.source)
            if unit is not None and not problems:
                problems += compare_sample(Sample.from_members(members), unit, units[unit.name][1].rows)
                compared += 1
            defects += [Defect(name, entry.key, what) for what in problems]
    return ShardVerdict(name, tuple(entry.key for entry in entries), compared, tuple(defects))


def _source_of(entry: Entry, source: Mapping[str, Unit]) -> Unit | None:
    try:
        return source.get(parse_key(entry.key)[0])
    except ValueError:
        return None


def check_sample(entry: Entry, members: Mapping[str, bytes], units: Mapping[str, tuple[int, PackedUnit]], audio: str) -> Iterator[str]:
    """What is wrong with one sample, by itself and beside its unit (index, unit) in the manifest."""
    try:
        name, m, p = parse_key(entry.key)
        sample = Sample.from_members(members)
    except ValueError as error:
        yield str(error)
        return
    if [extension for extension, _, _ in entry.members] != [extension for extension, _ in sample.members()]:
        yield "members are not in their order"
    if sample.kind != audio:
        yield f"audio is {sample.kind}, not {audio}"
    if name not in units:
        yield f"unit {name} is not in the manifest"
        return
    index, unit = units[name]
    if SEGMENT * m + 1 + p > unit.rows:
        yield f"the unit's {unit.rows} rows have no sample ({m}, {p})"
    if sample.id[:3].tolist() != [index, m, p] or not 0 <= sample.id[3] < len(MODES):
        yield f"id {sample.id.tolist()} instead of [{index}, {m}, {p}, 0..{len(MODES) - 1}]"
    yield from _check_audio(sample)
    yield from _check_labels(sample, unit, m, p)
    yield from _check_strip(sample, unit, m, p)


def _check_audio(sample: Sample) -> Iterator[str]:
    try:
        length = len(decode_audio(sample.audio, sample.kind))
    except ValueError as error:
        yield f"audio: {error}"
        return
    if sample.ends.min() < WINDOW or sample.ends.max() > length:
        yield f"ends reach from {sample.ends.min()} to {sample.ends.max()}, outside [{WINDOW}, {length}]"
    if (np.diff(sample.ends) < 0).any():
        yield "ends go back in time"


def _check_labels(sample: Sample, unit: PackedUnit, m: int, p: int) -> Iterator[str]:
    none = np.isnan(sample.va)
    if (none[:, 0] != none[:, 1]).any():
        yield "a label has only one of valence and arousal"
    if (np.abs(sample.va[~none]) > 1).any():
        yield "a label is outside [-1, 1]"
    past = strip_frames(m, p)[LEAD:] > unit.rows
    if (past & ~none.all(axis=1)).any():
        yield "a label stands past the end of the unit"
    if unit.split == "test" and not none.all():
        yield "a test unit has labels"


def _check_strip(sample: Sample, unit: PackedUnit, m: int, p: int) -> Iterator[str]:
    try:
        frames = split(sample.strip)
        pixels = np.asarray(decode(sample.strip))
    except StripError as error:
        yield f"strip: {error}"
        return
    if pixels.shape != (STRIP * SIZE, SIZE, 3) or len(frames) != STRIP:
        yield f"strip of {len(frames)} frames in {pixels.shape[0]}x{pixels.shape[1]} pixels"
        return
    if set(sample.present.tolist()) - {0, 1}:
        yield "present is not 0 or 1"
    inside = (strip_frames(m, p) >= 1) & (strip_frames(m, p) <= unit.rows)
    if (sample.present[~inside] != 0).any():
        yield "a frame outside the unit is marked present"
    # rows 0 and 111 may take colour from the neighbour where the decoder interpolates chroma
    inner = pixels.reshape(STRIP, SIZE, SIZE, 3)[:, 1:-1]
    for k in np.flatnonzero(sample.present == 0):
        if inner[k].any():
            yield f"strip frame {k} is marked absent but not black"
