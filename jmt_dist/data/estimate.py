"""Space and time of packing, from a few of the dataset's own videos and crops, before anything is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jmt_dist.affwild2.layout import Unit
from jmt_dist.affwild2.media import MediaError, frame_timestamps, median_interval, read_audio
from jmt_dist.data.geometry import RATE, STRIP, SUBSEQUENCE, WINDOW, samples_of, strip_frames
from jmt_dist.data.sample import AudioKind
from jmt_dist.data.strip import make_strip

TRIED = 3  # videos and samples measured
FLAC = 0.58  # of the size of PCM, measured on speech and noise
MEMBERS = 7 * 1024  # headers, raw members and padding of a sample
FALLBACK = (5200 * STRIP, 1 / 30, 0.003)  # bytes of a strip, seconds per frame, seconds to decode a second of sound


@dataclass(frozen=True)
class Estimate:
    """`bytes` of the finished shards, `work` of the sound laid down while packing, `seconds` with the given processes."""

    samples: int
    bytes: int
    work: int
    seconds: float

    def line(self) -> str:
        """For people."""
        minutes = f"{self.seconds / 60:.0f} minutes" if self.seconds > 90 else f"{self.seconds:.0f} s"
        return (
            f"{self.samples:,} samples; about {self.bytes / 1e9:.2f} GB of shards, {self.work / 1e9:.2f} GB more while packing, {minutes}"
        )


def _spread(units: Sequence[Unit]) -> list[Unit]:
    """A few units from all over the list."""
    return [units[i * len(units) // TRIED] for i in range(min(TRIED, len(units)))]


def _strips(units: Sequence[Unit]) -> tuple[float, float]:
    """(bytes, seconds) of a strip, from one sample in the middle of each of a few units."""
    start, size, count = time.perf_counter(), 0, 0
    for unit in _spread([u for u in units if u.crops and u.rows]):
        samples = samples_of(unit.rows)
        sources: list[bytes | None] = []
        for frame in strip_frames(*samples[len(samples) // 2]):
            path = next((p for p in (folder / f"{frame:05d}.jpg" for folder in unit.crops) if p.is_file()), None)
            sources.append(_bytes(path))
        size, count = size + len(make_strip(sources).data), count + 1
    return (size / count, (time.perf_counter() - start) / count) if count else (FALLBACK[0], 0.01)


def _bytes(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError:
        return None


def _sound(units: Sequence[Unit]) -> tuple[float, float]:
    """(seconds per frame, seconds to read a second of sound), from a few videos."""
    interval = cost = length = 0.0
    count = 0
    for unit in _spread([u for u in units if u.media]):
        assert unit.media is not None
        start = time.perf_counter()
        try:
            times = frame_timestamps(unit.media)
            read_audio(unit.media)
        except MediaError:
            continue
        interval, count = interval + median_interval(times), count + 1
        cost, length = cost + time.perf_counter() - start, length + len(times) * median_interval(times)
    return (interval / count, cost / max(length, 0.1)) if count else FALLBACK[1:]


def estimate(units: Sequence[Unit], audio: AudioKind, workers: int) -> Estimate:
    """Space and time to pack `units` with `workers` processes; measures a few of them (about a second)."""
    samples = sum(len(samples_of(unit.rows)) for unit in units)
    strip_bytes, strip_seconds = _strips(units)
    interval, decode = _sound(units)
    window = WINDOW + (SUBSEQUENCE - 1) * 4 * interval * RATE
    audio_bytes = 2 * window * (FLAC if audio == "flac" else 1)
    audio_seconds = 0.004 if audio == "flac" else 0.001
    length = interval * sum({unit.video: unit.rows for unit in units}.values())
    seconds = (samples * (strip_seconds + audio_seconds) + length * decode) / workers
    return Estimate(samples, int(samples * (strip_bytes + audio_bytes + MEMBERS)), int(2 * RATE * length), seconds)
