"""The steps of packing: pass 1 by video, what it comes to, pass 2 by shard. `pack` runs them here, `pack_part` in many jobs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jmt_dist.affwild2.folds import make_folds
from jmt_dist.affwild2.layout import Dataset, Unit
from jmt_dist.affwild2.release import SPLITS, Counts, name_release
from jmt_dist.config import PackOptions
from jmt_dist.data.geometry import samples_of
from jmt_dist.data.pack_guard import WORK, keep_plan, nameless
from jmt_dist.data.pack_shard import ShardResult, ShardTask, Source, finished, global_order, pack_shard, results_folder
from jmt_dist.data.pack_sound import Sounds, needs_of
from jmt_dist.data.pack_video import Note, VideoResult, VideoTask, prepare_video
from jmt_dist.data.progress import Progress, in_processes
from jmt_dist.data.report import PackReport
from jmt_dist.data.shards import Manifest, PackedUnit
from jmt_dist.errors import UserError

FIXTURE = "fixture"  # the release of a synthetic dataset


@dataclass(frozen=True)
class Content:
    """What pass 1 comes to: the units of the shards, those left out with the reason, and what to report."""

    release: str
    packed: tuple[PackedUnit, ...]
    omitted: Mapping[str, str]
    notes: tuple[Note, ...]
    counts: Mapping[str, Mapping[str, int]]
    digest: str  # of all that decides the shards but the crops themselves


def video_tasks(dataset: Dataset, work: Path) -> list[VideoTask]:
    """Pass 1, the longest videos first, so that no process is left with one at the end."""
    unnamed = nameless(dataset.units)
    groups: dict[str, list[Unit]] = {}
    for unit in dataset.units:
        if unit.name not in unnamed:
            groups.setdefault(unit.video, []).append(unit)
    (work / "videos").mkdir(parents=True, exist_ok=True)
    tasks = [VideoTask(work, video, tuple(units)) for video, units in groups.items()]
    return sorted(tasks, key=lambda task: (-max(unit.rows for unit in task.units), task.video))


def prepare_videos(options: PackOptions, tasks: Sequence[VideoTask]) -> list[VideoResult]:
    """Pass 1 for these videos, in `options.workers` processes."""
    results = []
    with Progress("pass 1, sound and inventory", len(tasks), "videos") as progress:
        for result in in_processes(prepare_video, tasks, options.workers):
            if options.strict and result.error:
                raise UserError(result.error, "Put it right, or pack with strict=false for silence and 30 frames per second.")
            results.append(result)
            progress.advance()
    return results


def settle(options: PackOptions, dataset: Dataset, videos: Sequence[VideoResult]) -> Content:
    """What is packed and what is left out. Raises UserError: nothing is left, too few videos for folds, an error with strict=true."""
    units = {unit.name: unit for unit in dataset.units}
    results = sorted((unit for video in videos for unit in video.units), key=lambda unit: unit.name)
    omitted = dict(sorted({**nameless(dataset.units), **{unit.name: unit.error for unit in results if unit.error}}.items()))
    if options.strict and omitted:
        name, reason = next(iter(omitted.items()))
        raise UserError(f"unit {name} cannot be packed: {reason}", "Put it right, or pack with strict=false to leave it out.")
    packed = tuple(
        PackedUnit(r.name, units[r.name].video, units[r.name].split, r.rows, r.valid, r.histogram) for r in results if not r.error
    )
    if not any(unit.rows for unit in packed):
        name, reason = next(iter(omitted.items()), ("none", "they have no rows"))
        raise UserError(f"no unit of {dataset.root} can be packed; {name}: {reason}", "Check the dataset folder.")
    make_folds((unit.summary() for unit in packed), options.folds)  # too few videos is an error now, not after hours
    invalid = {split: sum(r.invalid for r in results if units[r.name].split == split) for split in SPLITS}
    notes = [Note(problem.unit, problem.what, problem.sentence) for problem in dataset.problems]
    notes += [note for video in sorted(videos, key=lambda video: video.video) for unit in video.units for note in unit.notes]
    return Content(_release(dataset, invalid), packed, omitted, tuple(notes), _counts(packed, invalid), _digest(packed, videos))


def _digest(packed: Sequence[PackedUnit], videos: Sequence[VideoResult]) -> str:
    """sha256 of what pass 1 found, wherever the files lie."""
    facts = sorted(
        (v.video, v.frames, v.seconds, [(u.name, u.rows, u.valid, u.invalid, u.histogram, u.crops) for u in v.units]) for v in videos
    )
    units = [(unit.name, unit.split) for unit in packed]
    return hashlib.sha256(json.dumps([units, facts]).encode()).hexdigest()


def _release(dataset: Dataset, invalid: Mapping[str, int]) -> str:
    """The release by all of its counts; the folder alone does not tell the rows marked -5."""
    if dataset.release == FIXTURE:
        return FIXTURE
    found = {}
    for split in SPLITS:
        rows = [unit.rows for unit in dataset.units if unit.split == split]
        found[split] = Counts(len(rows), sum(rows), invalid[split])
    return name_release(found)


def _counts(packed: Sequence[PackedUnit], invalid: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Units, rows, labelled rows, rows marked -5 and samples by split."""
    counts = {}
    for split in SPLITS:
        units = [unit for unit in packed if unit.split == split]
        samples = sum(len(samples_of(unit.rows)) for unit in units)
        rows, valid = sum(u.rows for u in units), sum(u.valid for u in units)
        counts[split] = {"units": len(units), "rows": rows, "labelled rows": valid, "rows -5": invalid[split], "samples": samples}
    return counts


@dataclass(frozen=True)
class ShardPlan:
    """Pass 2: shards to make, those an earlier run finished, and which shards need which video's sound."""

    tasks: tuple[ShardTask, ...]
    done: tuple[ShardResult, ...]
    needs: Mapping[str, frozenset[str]]


def plan_shards(
    options: PackOptions, dataset: Dataset, content: Content, before: Manifest | None = None, known: PackReport | None = None
) -> ShardPlan:
    """What pass 2 has to do, after the plan of the folder has been compared with this one."""
    out, packed = Path(options.out), content.packed
    results = results_folder(out / WORK)
    results.mkdir(parents=True, exist_ok=True)
    keep_plan(out, options, packed, content.digest, before, started=any(results.glob("*.json")))
    for shard in known.shards if before is not None and known is not None else ():  # a finished folder that lost a shard
        (results / f"{shard.name}.json").write_text(json.dumps(asdict(shard)), encoding="utf-8")
    units = {unit.name: unit for unit in dataset.units}
    order = global_order([(unit.name, unit.rows) for unit in packed], options.seed)
    every = []
    for number, start in enumerate(range(0, len(order), options.samples_per_shard)):
        samples = tuple(order[start : start + options.samples_per_shard])
        indexes = sorted({index for index, _, _ in samples})
        sources = tuple(Source(i, packed[i].name, packed[i].video, units[packed[i].name].crops) for i in indexes)
        every.append(ShardTask(out, out / WORK, f"{number:05d}.tar", options.audio, samples, sources))
    earlier = {task.name: result for task in every if (result := finished(results, out, task.name)) is not None}
    tasks = tuple(task for task in every if task.name not in earlier)
    return ShardPlan(tasks, tuple(earlier.values()), needs_of(video_tasks(dataset, out / WORK), every))


def pack_shards(options: PackOptions, dataset: Dataset, plan: ShardPlan, part: int = 0, parts: int = 1) -> list[ShardResult]:
    """Pass 2 for every `parts`-th shard of the plan, in `options.workers` processes; sound goes as soon as no shard needs it."""
    out, results = Path(options.out), []
    tasks = [task for task in plan.tasks if int(task.name.split(".")[0]) % parts == part]
    sounds = Sounds(out, out / WORK, plan.needs)
    sounds.drop()
    sounds.restore(video_tasks(dataset, out / WORK), tasks, options.workers)
    with Progress("pass 2, shards", sum(len(task.samples) for task in tasks), "samples") as progress:
        for shard in in_processes(pack_shard, tasks, options.workers):
            results.append(shard)
            sounds.drop()
            progress.advance(shard.samples)
    return results
