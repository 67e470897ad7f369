"""Packing, pass 2: one shard out of what pass 1 laid down and the face crops (DESIGN section 6).

A shard's bytes depend on its samples alone. It appears by one rename; a small file beside the work says that
it is finished and what was met, so that a later run goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jmt_dist.data.geometry import samples_of, strip_frames
from jmt_dist.data.pack_video import video_folder
from jmt_dist.data.sample import AudioKind, Sample, audio_of, encode_audio, escape, key, labels_of
from jmt_dist.data.strip import make_strip
from jmt_dist.data.tars import ShardWriter, index_text

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
    """A finished shard: what the manifest says of it, samples by strip mode, frames by kind, unreadable crops (unit, frame)."""

    name: str
    samples: int
    bytes: int
    sha256: str
    modes: tuple[int, ...]
    frames: int
    black: int
    unreadable: tuple[tuple[str, int], ...]


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
    return ShardResult(**{**data, "modes": tuple(data["modes"]), "unreadable": tuple((u, f) for u, f in data["unreadable"])})


def results_folder(work: Path) -> Path:
    """Where results of finished shards are."""
    return work / "shards"


def pack_shard(task: ShardTask) -> ShardResult:
    """Write tar and index of one shard."""
    _array.cache_clear()  # what lay at these paths in an earlier run of this process is gone
    sources = {source.index: source for source in task.sources}
    modes = [0, 0, 0]
    frames = black = 0
    unreadable: set[tuple[str, int]] = set()
    partial = task.work / task.name
    with ShardWriter(partial) as writer:
        for index, m, p in task.samples:
            source = sources[index]
            sample, bad = make_sample(task.work, source, m, p, task.audio)
            writer.add(key(source.name, m, p), sample.members())
            modes[int(sample.id[3])] += 1
            frames += int(sample.present.sum())
            black += int((sample.present == 0).sum())
            unreadable |= {(source.name, frame) for frame in bad}
    result = ShardResult(task.name, len(task.samples), writer.size, writer.sha256, tuple(modes), frames, black, tuple(sorted(unreadable)))
    index_path = (task.out / task.name).with_suffix(".idx")
    index_partial = partial.with_suffix(".idx")
    index_partial.write_text(index_text(writer.entries), encoding="ascii")
    os.replace(index_partial, index_path)
    os.replace(partial, task.out / task.name)
    result_partial = task.work / f"{task.name}.json"
    result_partial.write_text(json.dumps(asdict(result)), encoding="utf-8")
    os.replace(result_partial, results_folder(task.work) / f"{task.name}.json")
    return result


def make_sample(work: Path, source: Source, m: int, p: int, audio: AudioKind) -> tuple[Sample, list[int]]:
    """Sample (m, p) of a unit, and the source frames whose crop cannot be read."""
    folder = str(video_folder(work, source.video))
    va, crops = (_array(f"{folder}/{escape(source.name)}.{what}.npy") for what in ("va", "crops"))
    frames = strip_frames(m, p)
    strip = make_strip([_crop(source, crops, int(frame)) for frame in frames])
    pcm, ends = audio_of(_array(f"{folder}/pcm.npy"), _array(f"{folder}/times.npy"), m, p)
    present = np.array(strip.present, np.uint8)
    identity = np.array([source.index, m, p, strip.mode], np.int32)
    sample = Sample(strip.data, encode_audio(pcm, audio), audio, ends, labels_of(va, m, p), present, identity)
    return sample, [int(frames[k]) for k in strip.unreadable]


def _crop(source: Source, crops: NDArray[np.uint8], frame: int) -> bytes | None:
    """Bytes of the crop of a source frame; None where there is none, b"" (no decoder takes it) where it cannot be read."""
    if not 1 <= frame <= len(crops) or not crops[frame - 1]:
        return None
    try:
        with open(f"{source.crops[crops[frame - 1] - 1]}/{frame:05d}.jpg", "rb") as file:
            return file.read()
    except OSError:
        return b""


@lru_cache(maxsize=4096)
def _array(path: str) -> NDArray[Any]:  # samples of a unit are spread over all shards: each is mapped once per process
    return np.load(path, mmap_mode="r")
