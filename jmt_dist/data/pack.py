"""Packing: the dataset's tree to shards and fold indexes, in two parallel passes (DESIGN section 6).

Pass 1 goes by video (`pack_video`), pass 2 by shard (`pack_shard`). Each leaves finished pieces that a later
run takes over; the manifest is written last, and with it the folder is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jmt_dist.affwild2.layout import Dataset, find_dataset
from jmt_dist.affwild2.release import SPLITS
from jmt_dist.config import PackOptions
from jmt_dist.data.estimate import estimate
from jmt_dist.data.fold_index import divide_units, write_fold_indexes
from jmt_dist.data.geometry import samples_of
from jmt_dist.data.pack_guard import (
    WORK,
    decisive,
    disk_errors,
    finished_manifest,
    is_whole,
    locked,
    nameless,
    refuse_foreign,
    require_same,
    require_space,
)
from jmt_dist.data.pack_steps import pack_shards, plan_shards, prepare_videos, settle, video_tasks
from jmt_dist.data.report import PackReport, printable, read_report
from jmt_dist.data.shards import FOLDS_FILE, MANIFEST, Manifest, Shard, fold_folder
from jmt_dist.errors import UserError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Packed:
    """What a run came to: both None after a dry run; the report is None where someone removed it."""

    manifest: Manifest | None
    report: PackReport | None


def pack(options: PackOptions, say: Say = print) -> Packed:
    """Pack, or complete, or only divide into folds, whichever the folder `options.out` needs.

    Raises UserError: no dataset, too little space, a disk that fills up or cannot be written, a source that goes
    away, another packing in the folder, or with strict=true the first input error. Anything else wrong in the
    input costs one unit or one modality and stands in the report.
    """
    out = Path(options.out)
    with disk_errors(out):
        if options.dry:
            survey(options, say)
            return Packed(None, None)
        new = not out.exists()
        claim(out, Path(options.source))
        try:
            return _pack_into(options, out, say)
        except UserError:
            if new:
                with suppress(OSError):
                    out.rmdir()  # refused before anything was written: leave no empty folder behind
            raise


def claim(out: Path, source: Path) -> None:
    """Make the folder. Raises UserError where it holds something that packing did not make, or lies in the dataset."""
    refuse_foreign(out, source)
    out.mkdir(parents=True, exist_ok=True)


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


def survey(options: PackOptions, say: Say) -> Dataset:
    """Find the dataset; say what is in it and what packing it needs. Raises UserError: too little space (but for a dry run)."""
    dataset = find_dataset(Path(_source(options)))
    nameless(dataset.units)
    say(f"{dataset.root}: release {dataset.release}")
    for split in SPLITS:
        units = [unit for unit in dataset.units if unit.split == split]
        samples = sum(len(samples_of(unit.rows)) for unit in units)
        without = f"{sum(not u.crops for u in units)} without crops, {sum(u.media is None for u in units)} without a video"
        say(f"  {split:<12}{len(units):>5} units {sum(u.rows for u in units):>11,} rows {samples:>8,} samples; {without}")
    for problem in dataset.problems:
        say(printable(f"  note: {f'{problem.unit} ' if problem.unit else ''}{problem.sentence}"))
    expected = estimate(dataset.units, options.audio, options.workers)
    say(expected.line())
    if not options.dry:
        require_space(Path(options.out), expected)
    return dataset


def _pack(options: PackOptions, out: Path, before: Manifest | None, known: PackReport | None, say: Say) -> tuple[Manifest, PackReport]:
    """Make what is missing, up to the manifest."""
    dataset = survey(options, say)
    videos = prepare_videos(options, video_tasks(dataset, out / WORK))
    content = settle(options, dataset, videos)
    plan = plan_shards(options, dataset, content, before, known)
    shards = sorted([*plan.done, *pack_shards(options, dataset, plan)], key=lambda shard: shard.name)
    if before is not None:
        require_same(before, shards)
    entries = tuple(Shard(s.name, s.samples, s.bytes, s.sha256) for s in shards)
    manifest = Manifest(out, content.release, decisive(options), content.packed, entries)
    report = PackReport(_source(options), content.release, content.counts, content.omitted, content.notes, tuple(shards))
    report.write(out, out / WORK)
    partial = out / WORK / MANIFEST
    partial.write_text(manifest.to_json(), encoding="utf-8")
    os.replace(partial, out / MANIFEST)  # last: a folder with a manifest lacks nothing but folds
    for line in report.to_text().splitlines():
        say(line)
    return manifest, report


def _add_folds(options: PackOptions, manifest: Manifest, say: Say) -> None:
    """Write the fold indexes of the options unless they are there."""
    folder = fold_folder(manifest.folder, options.folds)
    if (folder / FOLDS_FILE).is_file():
        say(f"folds {folder.name} are there already")
        return
    folds = divide_units(manifest, options.folds)
    write_fold_indexes(manifest, options.folds, folds)
    say(f"folds {folder.name}: {', '.join(folds.names)}")
