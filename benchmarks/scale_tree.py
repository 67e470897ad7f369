"""A dataset tree of the size of Aff-Wild2, cheaply: units and rows as counted, crops as hard links, sound copied by the packet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from jmt_dist.affwild2.fixture import CROPS, LABELS, SAMPLE, SETS, TEST_LIST
from jmt_dist.affwild2.fixture_voice import as_pcm, make_voice
from jmt_dist.affwild2.media import RATE

# units, rows, shortest, median and longest unit of each split of the real release
SPLITS = {
    "train": (356, 1_682_057, 263, 3_937, 47_435),
    "validation": (76, 383_814, 73, 4_097, 18_189),
    "test": (162, 927_210, 128, 4_257, 26_618),
}
PAIRS = 16 / 578  # of the videos show two people
FPS = (30,) * 8 + (25, 24)  # mostly 30
BLOCK = 1024  # samples of an AAC packet
TEMPLATE_SECONDS, GROUP = 60, 30  # of sound, and pictures between two key pictures, that are encoded; the rest repeats them


@dataclass(frozen=True)
class Planned:
    """A unit to be made: `video` is shared by the two people of a pair."""

    name: str
    video: str
    split: str
    rows: int
    fps: int


def plan(scale: float, seed: int = 0) -> list[Planned]:
    """Units of `scale` of the real dataset: `scale` of the units of each split, as long as real ones, at most the real rows."""
    rng = np.random.default_rng(seed)
    planned: list[Planned] = []
    for split, (units, rows, least, middle, most) in SPLITS.items():
        count = max({"train": 8, "validation": 4, "test": 1}[split], round(units * scale))
        total = max(round(rows * scale), count * least)
        lengths = _lengths(count, total, least, middle, most, rng)
        place, first = 0, len(planned)
        while place < count:
            pair = place + 1 < count and rng.random() < PAIRS
            video, fps = f"{len(planned):04d}", FPS[len(planned) % len(FPS)]
            for side in ("_left", "_right") if pair else ("",):
                # two people of one video have its length
                planned.append(Planned(f"{video}{side}", video, split, lengths[place], fps))
            place += 1 + pair
        # rounding, and pairs of one length, have moved the sum: one unit of its own video puts it right
        single = [k for k in range(first, len(planned)) if planned[k].name == planned[k].video]
        alone = max(single[1:] or single, key=lambda k: planned[k].rows)
        rest = total - sum(unit.rows for unit in planned[first:])
        planned[alone] = replace(planned[alone], rows=max(least, planned[alone].rows + rest))
    return planned


def _lengths(count: int, total: int, least: int, middle: int, most: int, rng: np.random.Generator) -> list[int]:
    """`count` lengths that add up to `total`, spread like the real ones; the longest is there where it fits."""
    draws = np.exp(rng.normal(np.log(middle), 0.6, count)).clip(least, most)
    if total >= 4 * most:
        draws[0] = most
    for _ in range(20):  # clipping moves the sum
        draws[1:] = (draws[1:] * (total - draws[0]) / max(1.0, draws[1:].sum())).clip(least, most)
    return [int(value) for value in np.floor(draws)]


def write_tree(root: Path, units: Sequence[Planned], people: Sequence[Sequence[Path]], seed: int = 0) -> None:
    """Labels, crops, videos and test lists of `units` under `root`.

    The crops of a unit are links to the pictures of one of `people`, which must be on the same disk: one person's have one quality.
    """
    rng = np.random.default_rng(seed)
    walk = np.clip(np.cumsum(rng.normal(0, 0.02, (100_000, 2)), 0) % 4 - 2, -2, 2)
    lines = [f"{v:.3f},{a:.3f}" for v, a in (1 - np.abs(walk))]
    videos: dict[str, Planned] = {}
    for k, unit in enumerate(units):
        videos.setdefault(unit.video, unit)
        if unit.split != "test":
            path = root / LABELS / SETS[unit.split] / f"{unit.name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            start = int(rng.integers(len(lines) - unit.rows))
            path.write_text("\n".join(["valence,arousal", *lines[start : start + unit.rows]]) + "\n", encoding="ascii")
        folder = root / CROPS / unit.name
        folder.mkdir(parents=True)
        pictures = people[k % len(people)]
        for frame in range(1, unit.rows + 1):
            os.link(pictures[frame % len(pictures)], f"{folder}/{frame:05d}.jpg")
    _write_test_files(root, [unit for unit in units if unit.split == "test"])
    sounds = [_Template(root / f".template{k}.mp4", k) for k in range(4)]
    for k, unit in enumerate(videos.values()):
        path = root / ("batch1" if k % 20 else "batch2") / f"{unit.video}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        sounds[k % len(sounds)].write(path, unit.rows, unit.fps)
    for sound in sounds:
        sound.path.unlink()


def _write_test_files(root: Path, units: Sequence[Planned]) -> None:
    head = ["image_location,valence,arousal"]
    rows: Iterator[str] = (f"{unit.name}/{frame:05d}.jpg,0,0" for unit in units for frame in range(1, unit.rows + 1))
    for place, lines in ((TEST_LIST, [unit.name for unit in units]), (SAMPLE, [*head, *rows])):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text("\n".join(lines) + "\n", encoding="ascii")


class _Template:
    """A short MP4 with MPEG-4 pictures and an AAC voice, whose packets are repeated for as long as a video shall be."""

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        seconds = TEMPLATE_SECONDS
        times = np.arange(0, seconds, 1 / 30)
        voice = make_voice(number, f"scale{number}", number, seconds, times, np.sin(np.stack([times / 5, times / 3], 1) + number))
        pcm = as_pcm(voice, RATE, 1)
        with av.open(str(path), "w") as container:
            video: Any = container.add_stream("mpeg4", rate=30, options={"g": str(GROUP), "bf": "0"})
            video.width, video.height, video.pix_fmt = 160, 120, "yuv420p"
            audio: Any = container.add_stream("aac", rate=RATE, layout="mono")
            audio.bit_rate = 96_000
            for k in range(GROUP):
                picture = np.full((120, 160, 3), 100 + k, np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(video.encode(None))
            for start in range(0, len(pcm) - BLOCK, BLOCK):
                block = av.AudioFrame.from_ndarray(pcm[start : start + BLOCK].reshape(1, -1).astype(np.float32) / 32768, "fltp", "mono")
                block.sample_rate, block.pts = RATE, start
                container.mux(audio.encode(block))
            container.mux(audio.encode(None))

    def write(self, path: Path, frames: int, fps: int) -> None:
        """An MP4 of `frames` pictures at `fps` with sound for as long."""
        with av.open(str(self.path)) as source, av.open(str(path), "w") as target:
            inputs = (source.streams.video[0], source.streams.audio[0])
            streams = [target.add_stream_from_template(stream) for stream in inputs]
            packets: list[list[Any]] = [[], []]
            for packet in source.demux(*inputs):
                if packet.size:
                    packets[packet.stream.type == "audio"].append(packet)
            blocks = -(-frames * RATE // (fps * BLOCK))
            clocks = (Fraction(1, fps), Fraction(BLOCK, RATE))
            done = [0, 0]
            for _ in range(frames + blocks):
                kind = int(done[0] >= frames or (done[1] < blocks and done[1] * clocks[1] <= done[0] * clocks[0]))
                packet = packets[kind][done[kind] % len(packets[kind])]
                packet.stream, packet.time_base = streams[kind], clocks[kind]
                packet.pts = packet.dts = done[kind]
                packet.duration = 1
                target.mux(packet)  # rescales the packet's times, which are set anew at its next turn
                done[kind] += 1
