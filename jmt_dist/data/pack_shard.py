"""Packing, pass 2: one shard out of what pass 1 laid down and the face crops (DESIGN section 6).

A shard's bytes depend on its samples alone. It appears by one rename; a small file beside the work says that
it is finished and what was met, so that a later run goes on behind it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jmt_dist.affwild2.media import median_interval
from jmt_dist.data.crop_kinds import count_kinds
from jmt_dist.data.geometry import samples_of, strip_frames
from jmt_dist.data.pack_video import SOUND, gone, video_folder
from jmt_dist.data.sample import AudioKind, Sample, audio_of, encode_audio, escape, key, labels_of
from jmt_dist.data.strip import make_strip
from jmt_dist.data.tars import ShardWriter, index_text

GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EHOSTDOWN}  # not a matter of one file
SampleId = tuple[int, int, int]  # unit index, m, p


@dataclass(frozen=True)
class Source:
    """Where a unit's samples come from: `index` is its place in the manifest, `crops` its crop folders."""

    index: int
    name: str
    video: str
    crops: tuple[Path, ...]


@dataclass(frozen=True)
class ShardTask:
    """What a process of pass 2 is given. `name` is the tar's, `sources` has the units its samples name."""

    out: Path
    work: Path
    name: str
    audio: AudioKind
    samples: tuple[SampleId, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class ShardResult:
    """A finished shard: what the manifest says of it, samples by strip mode, frames with a face and black ones,
    unreadable crops (unit, frame), and odd crops (unit, kind, frames)."""

    name: str
    samples: int
    bytes: int
    sha256: str
    modes: tuple[int, ...]
    frames: int
    black: int
    unreadable: tuple[tuple[str, int], ...]
    kinds: tuple[tuple[str, str, int], ...] = ()


def global_order(units: Sequence[tuple[str, int]], seed: int) -> list[SampleId]:
    """All samples of units (name, rows), by index, in the global order of `seed`.

    Sorted by a hash of seed and key: random, the same on every machine, and kept by all others when a unit goes.
    """
    samples = [(i, m, p) for i, (_, rows) in enumerate(units) for m, p in samples_of(rows)]
    return sorted(samples, key=lambda s: hashlib.sha256(f"{seed}/{key(units[s[0]][0], s[1], s[2])}".encode()).digest())


def finished(folder: Path, out: Path, name: str) -> ShardResult | None:
    """The result of a shard that an earlier run finished and that still has its size, else None."""
    try:
        result = parse_result((folder / f"{name}.json").read_text(encoding="utf-8"))
        complete = (out / name).stat().st_size == result.bytes and (out / name).with_suffix(".idx").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if complete else None


def parse_result(text: str) -> ShardResult:
    """A result from its JSON. Raises ValueError, KeyError or TypeError where it is none."""
    data = json.loads(text)
    return result_of(data)


def result_of(data: Mapping[str, Any]) -> ShardResult:
    """A result from its JSON's values. Raises KeyError or TypeError where they are none."""
    lists = {name: tuple(tuple(entry) for entry in data[name]) for name in ("unreadable", "kinds")}
    return ShardResult(**{**data, "modes": tuple(data["modes"]), **lists})


def results_folder(work: Path) -> Path:
    """Where results of finished shards are."""
    return work / "shards"


def pack_shard(task: ShardTask) -> ShardResult:
    """Write tar and index of one shard; whatever stops it, nothing half-written is left."""
    partial = task.work / task.name
    try:
        return _write_shard(task, partial)
    except BaseException:
        for path in (partial, partial.with_suffix(".idx")):
            path.unlink(missing_ok=True)
        raise


def _write_shard(task: ShardTask, partial: Path) -> ShardResult:
    for known in (_array, _interval):
        known.cache_clear()  # what lay at these paths in an earlier run of this process is gone
    sources = {source.index: source for source in task.sources}
    modes = [0, 0, 0]
    frames = black = 0
    unreadable: set[tuple[str, int]] = set()
    kinds: Counter[tuple[str, str]] = Counter()
    with ShardWriter(partial) as writer:
        for index, m, p in task.samples:
            source = sources[index]
            sample, bad, odd = make_sample(task.work, source, m, p, task.audio)
            writer.add(key(source.name, m, p), sample.members())
            modes[int(sample.id[3])] += 1
            frames += int(sample.present.sum())
            black += int((sample.present == 0).sum())
            unreadable |= {(source.name, frame) for frame in bad}
            kinds.update({(source.name, kind): count for kind, count in odd.items()})
    odd_crops = tuple((unit, kind, count) for (unit, kind), count in sorted(kinds.items()))
    seen = (tuple(modes), frames, black, tuple(sorted(unreadable)), odd_crops)
    result = ShardResult(task.name, len(task.samples), writer.size, writer.sha256, *seen)
    index_path = (task.out / task.name).with_suffix(".idx")
    index_partial = partial.with_suffix(".idx")
    index_partial.write_text(index_text(writer.entries), encoding="ascii")
    os.replace(index_partial, index_path)
    os.replace(partial, task.out / task.name)
    result_partial = task.work / f"{task.name}.json"
    result_partial.write_text(json.dumps(asdict(result)), encoding="utf-8")
    os.replace(result_partial, results_folder(task.work) / f"{task.name}.json")
    return result


def make_sample(work: Path, source: Source, m: int, p: int, audio: AudioKind) -> tuple[Sample, list[int], Counter[str]]:
    """Sample (m, p) of a unit, the source frames whose crop cannot be read, and its odd crops by kind."""
    folder = str(video_folder(work, source.video))
    va, crops = (_array(f"{folder}/{escape(source.name)}.{what}.npy") for what in ("va", "crops"))
    frames = strip_frames(m, p)
    files = [_crop(source, crops, int(frame)) for frame in frames]
    strip = make_strip(files)
    # mapped anew for each sample: pages of a mapping that is kept count as memory of the process, 9 GB for the whole dataset
    pcm = np.load(f"{folder}/{SOUND}", mmap_mode="r")
    pcm, ends = audio_of(pcm, _array(f"{folder}/times.npy"), m, p, _interval(f"{folder}/times.npy"))
    present = np.array(strip.present, np.uint8)
    identity = np.array([source.index, m, p, strip.mode], np.int32)
    sample = Sample(strip.data, encode_audio(pcm, audio), audio, ends, labels_of(va, m, p), present, identity)
    readable = [file if there else None for file, there in zip(files, strip.present, strict=True)]
    return sample, [int(frames[k]) for k in strip.unreadable], count_kinds(readable, strip.data, strip.mode)


def _crop(source: Source, crops: NDArray[np.uint8], frame: int) -> bytes | None:
    """Bytes of the crop of a source frame; None where there is none, b"" (no decoder takes it) where it cannot be read.

    Raises UserError where a crop that pass 1 saw is gone: black frames in its place would be nobody's wish.
    """
    if not 1 <= frame <= len(crops) or not crops[frame - 1]:
        return None
    path = f"{source.crops[crops[frame - 1] - 1]}/{frame:05d}.jpg"
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno in GONE:
            raise gone(path) from None
        return b""


@lru_cache(maxsize=4096)
def _array(path: str) -> NDArray[Any]:  # once per shard; read, not mapped: each mapping holds a descriptor, and 1,024 are often the limit
    return np.load(path)


@lru_cache(maxsize=4096)
def _interval(path: str) -> float:  # once per video: found anew for each sample, a unit of N frames would take N^2
    return median_interval(_array(path))
