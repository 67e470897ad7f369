"""A licence-safe synthetic Aff-Wild2 with a known ceiling (DESIGN section 13).

Layout, containers, crops and label files are as shipped; the people are drawn and the voices made.
Valence is seen mainly in the face, arousal heard mainly in the voice. fixture.json, written last,
holds the options, every unit, and the oracle CCC of face, voice and both.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jmt_dist.affwild2.fixture_face import make_identity, render_blocks
from jmt_dist.affwild2.fixture_gotchas import encode_crop, invalid_rows, label_file, missing_frames, plan_gotchas, text_of
from jmt_dist.affwild2.fixture_media import FACE, place_faces, write_media
from jmt_dist.affwild2.fixture_plan import UnitPlan, VideoPlan, plan_videos
from jmt_dist.affwild2.fixture_voice import as_pcm, make_voice
from jmt_dist.affwild2.fixture_walk import Array, Cues, Rows, ceilings, stream, unit_cues
from jmt_dist.config import FixtureOptions
from jmt_dist.errors import UserError
from jmt_dist.program import begin_worker

VERSIONS = {"none": 1, "harmless": 1, "all": 2}  # by gotchas; raised when the same options give other files
MANIFEST = "fixture.json"
UNFINISHED = ".unfinished"  # work in progress and what is done; gone when the fixture is complete
CROPS, NEW_CROPS = "cropped_aligned", "cropped_aligned_new_50_vids"
SETS = {"train": "Train_Set", "validation": "Validation_Set"}
LABELS = Path("annotations") / "VA_Estimation_Challenge"
TEST_LIST = Path("names_of_videos_in_each_test_set") / "Valence_Arousal_Estimation_Challenge_test_set_release.txt"
SAMPLE = Path("test_set_examples") / "CVPR_6th_ABAW_VA_test_set_example.txt"
STORE = "elsewhere"  # where the symbolic links of the gotcha point to
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class FixtureReport:
    """What a fixture holds. `made` is False where it was complete before; `ceiling` as in `fixture_walk.ceilings`."""

    out: Path
    units: tuple[str, ...]
    ceiling: Mapping[str, Mapping[str, float]]
    made: bool


def plan_fixture(options: FixtureOptions) -> list[VideoPlan]:
    """All videos of a fixture, in the order of their making."""
    videos = plan_videos(options)
    people = sum(len(v.people) for v in videos)
    return videos + plan_gotchas(options.gotchas, people)


def make_fixture(options: FixtureOptions, progress: Progress | None = None) -> FixtureReport:
    """Write the fixture to `options.out`, or go on with one that was interrupted.

    `progress(done, videos, name)` is called after each video. Raises UserError where the folder holds
    anything else, or a fixture of other options. The same options give the same JPEGs and labels, byte for
    byte, for any number of workers.
    """
    out = Path(options.out)
    videos = plan_fixture(options)
    if _is_complete(out, options):
        return _report(out, made=False)
    _claim(out, options)
    _make_videos(out, options, videos, progress)
    _write_test_files(out, [u for v in videos for u in v.people if u.split == "test"])
    _write(out / MANIFEST, json.dumps(_manifest(options, videos), indent=1).encode() + b"\n")
    shutil.rmtree(out / UNFINISHED)
    return _report(out, made=True)


# ---- what is there already


def _signature(options: FixtureOptions) -> dict[str, Any]:
    return {"version": VERSIONS[options.gotchas], **options.model_dump(mode="json", exclude={"out", "workers"})}


def _is_complete(out: Path, options: FixtureOptions) -> bool:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", "Choose a new folder with out=….")
    for path in (out / MANIFEST, out / UNFINISHED / "options.json"):
        if not path.is_file():
            continue
        try:
            held = json.loads(path.read_text(encoding="utf-8"))["options"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not of this program", "Choose a new folder with out=….") from None
        wanted = _signature(options)
        other = [f"{key}={held.get(key)}" for key in wanted if held.get(key) != wanted[key]]
        if other:
            raise UserError(f"{out} holds a fixture of other options ({', '.join(other)})", "Choose a new folder, or delete this one.")
        return path.name == MANIFEST
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and not a fixture", "Choose a new folder with out=….")
    return False


def _claim(out: Path, options: FixtureOptions) -> None:
    try:
        (out / UNFINISHED / "done").mkdir(parents=True, exist_ok=True)
        _write(out / UNFINISHED / "options.json", json.dumps({"options": _signature(options)}).encode())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}", "Choose another folder with out=….") from None


def _report(out: Path, made: bool) -> FixtureReport:
    held = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    return FixtureReport(out, tuple(held["units"]), held["ceiling"], made)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


# ---- making


def _make_videos(out: Path, options: FixtureOptions, videos: Sequence[VideoPlan], progress: Progress | None) -> None:
    todo = [v for v in videos if not _mark(out, v).exists()]
    done = len(videos) - len(todo)
    workers = min(options.workers, len(todo))
    for stem in _in_processes(out, options.seed, todo, workers) if workers > 1 else (make_video(out, options.seed, v) for v in todo):
        done += 1
        if progress:
            progress(done, len(videos), stem)


def _in_processes(out: Path, seed: int, todo: Sequence[VideoPlan], workers: int) -> Iterator[str]:
    # spawned, not forked: the caller may run threads; one BLAS thread each, set before NumPy is imported there
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=begin_worker) as pool:
        futures: list[Future[str]] = [pool.submit(make_video, out, seed, v) for v in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _mark(out: Path, plan: VideoPlan) -> Path:
    return out / UNFINISHED / "done" / plan.stem


def make_video(out: Path, seed: int, plan: VideoPlan) -> str:
    """Write one video with its units: crops, media and labels are prepared apart, then renamed into place."""
    work = out / UNFINISHED / f"work-{plan.stem}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    seen = [_write_crops(work, seed, plan, unit) for unit in plan.people]
    _write_media(work, seed, plan, place_faces(seen, plan.frames))
    _publish_media(out, work, plan)
    for unit in plan.people:
        _publish_crops(out, work, unit)
        if unit.split != "test":
            labels = unit_rows(seed, plan, unit, complete=False).labels
            _publish_labels(out, unit, SETS[unit.split], labels)
            if unit.gotcha == "duplicate":  # shorter, so that taking it for the first would be seen
                _publish_labels(out, unit, SETS["validation"], labels[: len(labels) // 2])
    shutil.rmtree(work)
    _mark(out, plan).touch()
    return plan.stem


def _decimals(unit: UnitPlan) -> int:
    return (3, 3, 9)[unit.number % 3]  # most releases round to 3, resampled ones do not


def cues_of(seed: int, plan: VideoPlan, unit: UnitPlan) -> tuple[Array, Cues]:
    """Times [T] and cues of a unit, for as many rows as the longer of its labels and its video has."""
    times = plan.times(max(unit.rows, plan.frames))
    speaker = plan.people[0]
    return times, unit_cues(seed, unit.name, unit.number, times, None if unit is speaker else (speaker.name, speaker.number))


def unit_rows(seed: int, plan: VideoPlan, unit: UnitPlan, complete: bool = True) -> Rows:
    """Labels [N, 2] as written and, where `complete`, cues [N, 2] that are shown: 0 without crop or without voice."""
    _, cues = cues_of(seed, plan, unit)
    labels = np.round(np.stack([cues.valence, cues.arousal], 1)[: unit.rows], _decimals(unit))
    labels[invalid_rows(unit.gotcha, unit.rows)] = np.nan
    face, voice = cues.face[: unit.rows].copy(), cues.voice[: unit.rows].copy()
    if complete:
        face[[k - 1 for k in missing_frames(unit.gotcha, plan.frames) if k <= unit.rows]] = 0
        face[plan.frames :] = 0
        voice *= plan.sound.kind == "voice"
    return Rows(labels, face, voice)


def _write_crops(work: Path, seed: int, plan: VideoPlan, unit: UnitPlan) -> NDArray[np.uint8]:
    """Write the crops of one unit; returns its faces for the video, [F, 56, 56, 3]."""
    folder = work / CROPS / unit.name
    folder.mkdir(parents=True)
    times, cues = cues_of(seed, plan, unit)
    absent = missing_frames(unit.gotcha, plan.frames)
    quality = 90 + int(stream(seed, unit.name, "quality").integers(6))
    faces = np.empty((plan.frames, FACE, FACE, 3), np.uint8)
    frame = 0
    for block in render_blocks(seed, unit.name, make_identity(seed, unit.identity), times[: plan.frames], cues.face[: plan.frames]):
        for pixels in block:
            faces[frame] = pixels.reshape(FACE, 2, FACE, 2, 3).mean((1, 3), dtype=np.float32)
            frame += 1
            if frame not in absent:
                (folder / f"{frame:05d}.jpg").write_bytes(encode_crop(unit.gotcha, frame, pixels, quality))
    return faces


def _write_media(work: Path, seed: int, plan: VideoPlan, pictures: NDArray[np.uint8]) -> None:
    path, sound, speaker = work / f"media{plan.suffix}", plan.sound, plan.people[0]
    if speaker.gotcha in ("unreadable-media", "test-unreadable"):
        path.write_bytes(bytes(stream(seed, plan.stem, "rubbish").integers(0, 256, 20_000, np.uint8)))
        return
    times, cues = cues_of(seed, plan, speaker)
    seconds = (times[plan.frames - 1] + 1 / plan.fps) * sound.share + sound.lead
    voice = make_voice(seed, speaker.name, speaker.identity, seconds, times + sound.lead, cues.voice)
    pcm = as_pcm(voice, sound.rate, sound.channels)[round(sound.start * sound.rate) :]
    write_media(path, plan, pictures, pcm)


# ---- publishing


def _publish_labels(out: Path, unit: UnitPlan, folder: str, labels: Array) -> None:
    path = out / LABELS / folder / f"{unit.name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, label_file(unit.gotcha, labels, _decimals(unit)))


def _publish_media(out: Path, work: Path, plan: VideoPlan) -> None:
    gotcha = plan.people[0].gotcha
    if gotcha == "no-media":
        return
    target = out / plan.batch / (plan.stem + plan.suffix)
    if gotcha == "duplicate":
        double = work / f"double{plan.suffix}"
        shutil.copyfile(work / f"media{plan.suffix}", double)
        _move(double, out / "batch2" / target.name)
    _move(work / f"media{plan.suffix}", target, out / STORE if gotcha == "symbolic-link" else None)


def _publish_crops(out: Path, work: Path, unit: UnitPlan) -> None:
    source = work / CROPS / unit.name
    if unit.gotcha == "no-crops":
        return
    if unit.gotcha == "split-folder":
        later = work / NEW_CROPS / unit.name
        later.mkdir(parents=True)
        names = sorted(p.name for p in source.iterdir())
        for name in names[len(names) // 2 :]:
            (source / name).rename(later / name)
        _move(later, out / NEW_CROPS / unit.name)
    folder = NEW_CROPS if unit.gotcha == "new-folder" else CROPS
    _move(source, out / folder / unit.name, out / STORE if unit.gotcha == "symbolic-link" else None)


def _move(source: Path, target: Path, store: Path | None = None) -> None:
    """Rename a file or folder into place, in place of what an interrupted run left; with `store`, leave a link there."""
    for path in (target, store / target.name) if store else (target,):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
    if store:
        source.rename(store / target.name)
        target.symlink_to(os.path.relpath(store / target.name, target.parent))
    else:
        source.rename(target)


def _write_test_files(out: Path, units: Sequence[UnitPlan]) -> None:
    if not units:
        return
    units = sorted(units, key=lambda unit: unit.name)
    for path, lines in (
        (TEST_LIST, [unit.name for unit in units]),
        (SAMPLE, ["image_location,valence,arousal", *(f"{u.name}/{k:05d}.jpg,0,0" for u in units for k in range(1, u.rows + 1))]),
    ):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        _write(out / path, ("\n".join(lines) + "\n").encode())


def _manifest(options: FixtureOptions, videos: Sequence[VideoPlan]) -> dict[str, Any]:
    units = {
        u.name: {
            "video": v.stem,
            "media": f"{v.batch}/{v.stem}{v.suffix}",
            "split": u.split,
            "rows": u.rows,
            "frames": v.frames,
            "fps": v.fps,
            "identity": u.identity,
            "sound": asdict(v.sound),
            "gotcha": u.gotcha,
            "meaning": text_of(u.gotcha),
        }
        for v in videos
        for u in v.people
    }
    labelled = [(u.split, unit_rows(options.seed, v, u)) for v in videos for u in v.people if u.split != "test" and not v.costly]
    return {
        "options": _signature(options),
        "units": dict(sorted(units.items())),
        "ceiling": ceilings([rows for _, rows in labelled]),
        "ceiling_by_split": {s: ceilings([rows for split, rows in labelled if split == s]) for s in SETS},
    }
