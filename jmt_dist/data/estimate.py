"""Space and time of packing, from a few of the dataset's own videos and crops, before anything is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from jmt_dist.affwild2.layout import Unit
from jmt_dist.affwild2.media import FALLBACK_FPS, MediaError, frame_timestamps, median_interval, read_audio
from jmt_dist.data.geometry import RATE, STEP, STRIP, SUBSEQUENCE, WINDOW, samples_of, strip_frames
from jmt_dist.data.sample import AudioKind, encode_audio
from jmt_dist.data.strip import make_strip

TRIED = 3  # videos and samples measured
MEMBERS = 7 * 1024  # headers, raw members and padding of a sample
STRIP_BYTES = 5200 * STRIP  # where no crop can be measured
EXCERPT = 10 * RATE  # samples of sound encoded for measurement


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
        sources = [_crop(unit, frame) for frame in strip_frames(*samples[len(samples) // 2]).tolist()]
        size, count = size + len(make_strip(sources).data), count + 1
    return (size / count, (time.perf_counter() - start) / count) if count else (STRIP_BYTES, 0.01)


def _crop(unit: Unit, frame: int) -> bytes | None:
    for folder in unit.crops:
        try:
            return (folder / f"{frame:05d}.jpg").read_bytes()
        except OSError:  # missing, or a folder that may not be read: pass 1 says so
            continue
    return None


@dataclass
class _Sound:
    """Sums over the videos measured; `bytes` and `encoding` seconds are of `samples` of sound."""

    interval: float = 0.0  # seconds per frame
    videos: int = 0
    length: float = 0.0  # seconds
    reading: float = 0.0  # seconds
    samples: int = 0
    bytes: int = 0
    encoding: float = 0.0


def _sound(units: Sequence[Unit], audio: AudioKind) -> _Sound:
    """Frame rate, time and size of the sound of a few videos."""
    found = _Sound()
    for unit in _spread([u for u in units if u.media]):
        assert unit.media is not None
        start = time.perf_counter()
        try:
            times = frame_timestamps(unit.media)
            indexed = time.perf_counter() - start
            pcm = read_audio(unit.media, until=2 * EXCERPT / RATE)  # not the whole: packing decodes a container once
        except MediaError:
            continue
        length = len(times) * median_interval(times)
        decoded = time.perf_counter() - start - indexed
        found.reading += indexed + decoded * max(1.0, length * RATE / max(1, len(pcm) if pcm is not None else 0, EXCERPT))
        found.interval += median_interval(times)
        found.length += length
        found.videos += 1
        if pcm is not None:
            start = time.perf_counter()
            excerpt = pcm[len(pcm) // 2 :][:EXCERPT]
            found.bytes += len(encode_audio(excerpt, audio))
            found.samples += len(excerpt)
            found.encoding += time.perf_counter() - start
    return found


def estimate(units: Sequence[Unit], audio: AudioKind, workers: int) -> Estimate:
    """Space and time to pack `units` with `workers` processes; measures a few of them (about a second)."""
    samples = sum(len(samples_of(unit.rows)) for unit in units)
    strip_bytes, strip_seconds = _strips(units)
    sound = _sound(units, audio)
    interval = sound.interval / sound.videos if sound.videos else 1 / FALLBACK_FPS
    window = WINDOW + (SUBSEQUENCE - 1) * STEP * interval * RATE  # samples of sound that the clips of a sample cover
    audio_bytes = window * (sound.bytes / sound.samples if sound.samples else 2)
    audio_seconds = window * (sound.encoding / sound.samples if sound.samples else 0)
    length = interval * sum({unit.video: unit.rows for unit in units}.values())
    reading = length * sound.reading / sound.length if sound.length else 0
    seconds = (samples * (strip_seconds + audio_seconds) + reading) / workers
    return Estimate(samples, int(samples * (strip_bytes + audio_bytes + MEMBERS)), int(2 * RATE * length), seconds)
