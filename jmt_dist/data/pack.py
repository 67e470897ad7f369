"""Packing: the dataset's tree to shards and fold indexes, in two parallel passes (DESIGN section 6).

Pass 1 goes by video (`pack_video`), pass 2 by shard (`pack_shard`). Each leaves finished pieces that a later
run takes over; the manifest is written last, and with it the folder is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from jmt_dist.affwild2.folds import make_folds
from jmt_dist.affwild2.layout import Dataset, Unit, find_dataset
from jmt_dist.config import PackOptions
from jmt_dist.data.estimate import estimate
from jmt_dist.data.fold_index import divide_units, write_fold_indexes
from jmt_dist.data.geometry import samples_of
from jmt_dist.data.pack_guard import (
    WORK,
    decisive,
    finished_manifest,
    is_whole,
    keep_plan,
    locked,
    refuse_foreign,
    refuse_long_names,
    require_space,
)
from jmt_dist.data.pack_shard import ShardResult, ShardTask, Source, finished, global_order, pack_shard, results_folder
from jmt_dist.data.pack_video import Note, VideoResult, VideoTask, prepare_video
from jmt_dist.data.progress import Progress, in_processes
from jmt_dist.data.report import PackReport, read_report
from jmt_dist.data.shards import FOLDS_FILE, MANIFEST, Manifest, PackedUnit, Shard, fold_folder
from jmt_dist.errors import UserError

SPLITS = ("train", "validation", "test")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Packed:
    """What a run came to: both None after a dry run; the report is None where someone removed it."""

    manifest: Manifest | None
    report: PackReport | None


def pack(options: PackOptions, say: Say = print) -> Packed:
    """Pack, or complete, or only divide into folds, whichever the folder `options.out` needs.

    Raises UserError: no dataset, too little space, another packing in the folder, or with strict=true the first
    input error. Anything else wrong in the input costs one unit or one modality and stands in the report.
    """
    if options.dry:
        _survey(options, say)
        return Packed(None, None)
    out = Path(options.out)
    refuse_foreign(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        return _pack_into(options, out, say)
    except UserError:
        with suppress(OSError):
            out.rmdir()  # refused before anything was written: leave no empty folder behind
        raise


def _pack_into(options: PackOptions, out: Path, say: Say) -> Packed:
    with locked(out):
        report = read_report(out)
        manifest = finished_manifest(out, options, _source(options), report.source if report else None)
        if manifest is None or not is_whole(manifest):
            manifest, report = _pack(options, out, manifest, report, say)
        else:
            say(f"{out} is packed already: {manifest.samples:,} samples")
            for line in report.omission_lines() if report and report.omitted else []:
                say(line)
        _add_folds(options, manifest, say)
        shutil.rmtree(out / WORK, ignore_errors=True)
    return Packed(manifest, report)


def _source(options: PackOptions) -> str:
    return str(Path(options.source).resolve())


def _survey(options: PackOptions, say: Say) -> Dataset:
    """Find the dataset; say what is in it and what packing it needs. Raises UserError: too little space (but for a dry run)."""
    dataset = find_dataset(Path(options.source))
    refuse_long_names(dataset.units)
    say(f"{dataset.root}: release {dataset.release}")
    for split in SPLITS:
        units = [unit for unit in dataset.units if unit.split == split]
        samples = sum(len(samples_of(unit.rows)) for unit in units)
        without = f"{sum(not u.crops for u in units)} without crops, {sum(u.media is None for u in units)} without a video"
        say(f"  {split:<12}{len(units):>5} units {sum(u.rows for u in units):>11,} rows {samples:>8,} samples; {without}")
    for problem in dataset.problems:
        say(f"  note: {f'{problem.unit} ' if problem.unit else ''}{problem.sentence}")
    expected = estimate(dataset.units, options.audio, options.workers)
    say(expected.line())
    if not options.dry:
        require_space(Path(options.out), expected)
    return dataset


def _pack(options: PackOptions, out: Path, before: Manifest | None, known: PackReport | None, say: Say) -> tuple[Manifest, PackReport]:
    """Make what is missing, up to the manifest."""
    dataset = _survey(options, say)
    videos = _pass_one(options, dataset, out / WORK)
    units = {unit.name: unit for unit in dataset.units}
    results = sorted((unit for video in videos for unit in video.units), key=lambda unit: unit.name)
    omitted = {unit.name: unit.error for unit in results if unit.error}
    if options.strict and omitted:
        name, reason = next(iter(omitted.items()))
        raise UserError(f"unit {name} cannot be packed: {reason}", "Put it right, or pack with strict=false to leave it out.")
    packed = tuple(
        PackedUnit(r.name, units[r.name].video, units[r.name].split, r.rows, r.valid, r.histogram) for r in results if not r.error
    )
    if not any(unit.rows for unit in packed):
        raise UserError(f"no unit of {dataset.root} can be packed; the first: {next(iter(omitted.items()))}", "Check the dataset folder.")
    make_folds((unit.summary() for unit in packed), options.folds)  # too few videos is an error now, not after hours
    shards = _pass_two(options, out, packed, units, before, known)
    entries = tuple(Shard(s.name, s.samples, s.bytes, s.sha256) for s in shards)
    manifest = Manifest(out, dataset.release, decisive(options), packed, entries)
    notes = [Note(problem.unit, "dataset folder", problem.sentence) for problem in dataset.problems]
    notes += [note for video in videos for unit in video.units for note in unit.notes]
    report = PackReport(_source(options), dataset.release, _counts(packed), omitted, tuple(notes), tuple(shards))
    report.write(out)
    partial = out / f".{MANIFEST}.partial"
    partial.write_text(manifest.to_json(), encoding="utf-8")
    os.replace(partial, out / MANIFEST)  # last: a folder with a manifest lacks nothing but folds
    for line in report.to_text().splitlines():
        say(line)
    return manifest, report


def _counts(packed: Sequence[PackedUnit]) -> dict[str, dict[str, int]]:
    """Units, rows, labelled rows and samples by split."""
    counts = {}
    for split in SPLITS:
        units = [unit for unit in packed if unit.split == split]
        samples = sum(len(samples_of(unit.rows)) for unit in units)
        rows, valid = sum(u.rows for u in units), sum(u.valid for u in units)
        counts[split] = {"units": len(units), "rows": rows, "labelled rows": valid, "samples": samples}
    return counts


def _pass_one(options: PackOptions, dataset: Dataset, work: Path) -> list[VideoResult]:
    """Every video prepared, by name."""
    groups: dict[str, list[Unit]] = {}
    for unit in dataset.units:
        groups.setdefault(unit.video, []).append(unit)
    (work / "videos").mkdir(parents=True, exist_ok=True)
    tasks = [VideoTask(work, video, tuple(units)) for video, units in groups.items()]
    tasks.sort(key=lambda task: -max(unit.rows for unit in task.units))  # long ones first: no process is left with one at the end
    results = []
    with Progress("pass 1, sound and inventory", len(tasks), "videos") as progress:
        for result in in_processes(prepare_video, tasks, options.workers):
            if options.strict and result.error:
                raise UserError(result.error, "Put it right, or pack with strict=false for silence and 30 frames per second.")
            results.append(result)
            progress.advance()
    return sorted(results, key=lambda result: result.video)


def _pass_two(
    options: PackOptions,
    out: Path,
    packed: Sequence[PackedUnit],
    units: Mapping[str, Unit],
    before: Manifest | None,
    known: PackReport | None,
) -> list[ShardResult]:
    """All shards, in order; those an earlier run finished are taken over."""
    results = results_folder(out / WORK)
    results.mkdir(parents=True, exist_ok=True)
    keep_plan(out, options, packed, before, started=any(results.glob("*.json")))
    for shard in known.shards if before is not None and known is not None else ():  # a finished folder that lost a shard
        (results / f"{shard.name}.json").write_text(json.dumps(asdict(shard)), encoding="utf-8")
    order = global_order([(unit.name, unit.rows) for unit in packed], options.seed)
    tasks, shards = [], []
    for number, start in enumerate(range(0, len(order), options.samples_per_shard)):
        samples = tuple(order[start : start + options.samples_per_shard])
        indexes = sorted({index for index, _, _ in samples})
        sources = tuple(Source(i, packed[i].name, packed[i].video, units[packed[i].name].crops) for i in indexes)
        task = ShardTask(out, out / WORK, f"{number:05d}.tar", options.audio, samples, sources)
        done = finished(results, out, task.name)
        if done is None:
            tasks.append(task)
        else:
            shards.append(done)
    with Progress("pass 2, shards", sum(len(task.samples) for task in tasks), "samples") as progress:
        for shard in in_processes(pack_shard, tasks, options.workers):
            shards.append(shard)
            progress.advance(shard.samples)
    return sorted(shards, key=lambda shard: shard.name)


def _add_folds(options: PackOptions, manifest: Manifest, say: Say) -> None:
    """Write the fold indexes of the options unless they are there."""
    folder = fold_folder(manifest.folder, options.folds)
    if (folder / FOLDS_FILE).is_file():
        say(f"folds {folder.name} are there already")
        return
    folds = divide_units(manifest, options.folds)
    write_fold_indexes(manifest, options.folds, folds)
    say(f"folds {folder.name}: {', '.join(folds.names)}")
