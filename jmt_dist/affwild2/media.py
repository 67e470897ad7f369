"""What a video file says about time and sound: frame timestamps and mono audio on one clock (DESIGN section 5).

The common zero of a file is the earlier of the declared starts of its video and its audio stream.
Timestamps count from it in seconds, and sample 0 of the audio is at it, so that an offset between the
streams is applied by construction and nothing recorded before the first frame is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from jmt_dist.errors import UserError

RATE = 44_100  # samples per second
FALLBACK_FPS = 30.0  # of a unit whose container cannot be read
GAP = 0.05  # seconds: timestamps nearer than this to where the samples end are jitter, others a gap
LONGEST = 6 * 3600.0  # seconds: a jump of timestamps beyond this, or beyond the declared duration, is not believed
MICROSECOND = 1e-6  # unit of a container's own times

av.logging.set_level(av.logging.PANIC)  # FFmpeg's remarks about odd files go to stderr otherwise; errors arrive as exceptions


class MediaError(UserError):
    """A container that cannot be read; packing goes on with silence and 30 fps, and reports it."""


def fallback_timestamps(rows: int) -> NDArray[np.float64]:
    """Timestamps [rows] in seconds of a unit without a readable container: 30 frames per second from 0."""
    return np.arange(rows, dtype=np.float64) / FALLBACK_FPS


def frame_timestamps(path: Path) -> NDArray[np.float64]:
    """Presentation times [F] in seconds of all video frames, ascending, relative to the common zero.

    Packets are read, not decoded. Where packets carry no presentation time, decoding times stand in; where
    they carry none either, the declared frame rate. Raises MediaError: unreadable, no video stream, no frame.
    """
    with _opened(path) as container:
        stream = _best(container, "video")
        if stream is None:
            raise MediaError(f"{path} has no video stream", "Copy the file again from the dataset as shipped.")
        packets = [packet for packet in _packets(container, stream) if packet.size and not packet.is_discard]
        if not packets:
            raise MediaError(f"{path} has no video frame", "Copy the file again from the dataset as shipped.")
        times = [packet.pts for packet in packets]
        if None in times:
            times = [packet.dts for packet in packets]
        if None in times:
            rate = float(stream.guessed_rate or stream.average_rate or FALLBACK_FPS)
            return np.arange(len(packets), dtype=np.float64) / rate
        return np.sort(np.array(times, np.float64)) * float(stream.time_base) - _zero(container)


@dataclass(frozen=True)
class SoundStream:
    """An audio stream as its container declares it; `start` is in seconds after the first picture (negative: before it)."""

    rate: int
    channels: int
    start: float


def sound_stream(path: Path) -> SoundStream | None:
    """The declaration of a file's audio stream, None where it has none; nothing is decoded. Raises MediaError: unreadable."""
    with _opened(path) as container:
        stream, video = _best(container, "audio"), _best(container, "video")
        if stream is None:
            return None
        known = stream.start_time is not None and video is not None and video.start_time is not None
        start = float(stream.start_time * stream.time_base - video.start_time * video.time_base) if known else 0.0
        return SoundStream(stream.codec_context.sample_rate or 0, stream.codec_context.channels or 0, start)


def end_samples(
    timestamps: NDArray[np.float64], frames: NDArray[np.int64], rate: int = RATE, interval: float | None = None
) -> NDArray[np.int64]:
    """Audio sample index, any shape as `frames`, of each source frame's timestamp.

    `timestamps` [F] in seconds, F >= 1; `frames` count from 1 and may lie before 1 or past F: there time
    continues at the median interval (DESIGN section 4), so an index may be negative. A clip's audio is the
    `data.geometry.WINDOW` samples before its index. `interval` is that median where the caller knows it: finding
    it takes the whole of `timestamps`.
    """
    if not len(timestamps):
        raise ValueError("a unit without timestamps has no time")
    interval = median_interval(timestamps) if interval is None else interval
    count = len(timestamps)
    inside = np.clip(frames, 1, count)
    seconds = timestamps[inside - 1] + (frames - inside) * interval
    return np.rint(seconds * rate).astype(np.int64)


def median_interval(timestamps: NDArray[np.float64]) -> float:
    """Median seconds between neighbouring frames; of a single frame, 1/30."""
    steps = np.diff(timestamps)
    steps = steps[steps > 0]
    return float(np.median(steps)) if len(steps) else 1 / FALLBACK_FPS


def read_audio(path: Path, rate: int = RATE, until: float = LONGEST) -> NDArray[np.int16] | None:
    """The sound of a file as int16 mono [samples] at `rate`, sample 0 at the common zero; None if it has none.

    Reading stops at the first packet past `until` seconds.

    Channels are mixed down evenly. Each run of samples lies where its timestamps say: what starts late or
    is interrupted is padded with silence, what lies before zero is cut. Damaged packets become silence.
    Memory is the result's: 5.3 MB per minute. Raises MediaError: unreadable, or nothing in it can be decoded.
    """
    with _opened(path) as container:
        stream = _best(container, "audio")
        if stream is None:
            return None
        zero = _zero(container)
        declared = container.duration * MICROSECOND + 1 if container.duration else LONGEST
        track = _Track(rate, min(declared, LONGEST))
        broken = 0
        for packet in _packets(container, stream):
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                broken += 1
                continue
            for frame in frames:
                track.add(frame, None if frame.pts is None else float(frame.pts * frame.time_base) - zero)
            if track.end > until:
                break
        samples = track.finish()
        if not len(samples) and broken:
            raise MediaError(f"the audio of {path} cannot be decoded", "Copy the file again from the dataset as shipped.")
        return samples if len(samples) else None


class _Track:
    """Collects decoded audio frames at the places their times give them.

    A run is a stretch of frames without a gap; one resampler serves one run, so that its filter never
    smears over a gap and rounding of timestamps (1 ms in Matroska) never makes one.
    """

    def __init__(self, rate: int, limit: float) -> None:
        self.rate, self.limit = rate, limit
        self.buffer = np.zeros(round(limit * rate), np.int16)  # untouched pages cost no memory
        self.length = 0  # samples of the result so far
        self.position = 0  # where the next resampled sample goes
        self.end = 0.0  # seconds: where the samples of the run end, counted in source samples
        self.resampler: Any = None
        self.kind: tuple[str, str, int] | None = None

    def add(self, frame: Any, at: float | None) -> None:
        """Append a decoded frame; `at` is its time in seconds, None if it has none."""
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        gap = at is not None and abs(at - self.end) > GAP and at <= self.limit
        if self.resampler is None or kind != self.kind or gap:
            self._flush()
            self.end = at if at is not None and at <= self.limit else self.end
            self.position = round(self.end * self.rate)
            self.resampler, self.kind = av.AudioResampler(format="s16", layout="mono", rate=self.rate), kind
        self.end += frame.samples / frame.sample_rate
        frame.pts = None  # the filter graph counts samples; times are kept here
        for part in self.resampler.resample(frame):
            self._write(part.to_ndarray()[0])

    def finish(self) -> NDArray[np.int16]:
        """The collected samples."""
        self._flush()
        return self.buffer[: self.length]

    def _flush(self) -> None:
        if self.resampler is not None:
            for part in self.resampler.resample(None):
                if part is not None:  # a resampler with nothing to convert hands the None through
                    self._write(part.to_ndarray()[0])

    def _write(self, samples: NDArray[np.int16]) -> None:
        start, stop = self.position, self.position + len(samples)
        self.position = stop
        if stop <= 0:
            return
        if stop > len(self.buffer):
            grown = np.zeros(max(stop, len(self.buffer) * 5 // 4), np.int16)
            grown[: self.length] = self.buffer[: self.length]
            self.buffer = grown
        self.buffer[max(start, 0) : stop] = samples[max(-start, 0) :]
        self.length = max(self.length, stop)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            yield container
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise MediaError(f"{path} cannot be read: {reason}", "Copy the file again from the dataset as shipped.") from None


def _best(container: Any, kind: str) -> Any:
    """The stream of a kind that a player would choose (never a cover picture), or None."""
    return container.streams.best(kind)


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets of a stream up to the end, or up to where a truncated file stops making sense."""
    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        return


def _zero(container: Any) -> float:
    """Seconds of the common zero on the container's own clock."""
    starts = [_best(container, kind) for kind in ("video", "audio")]
    known = [float(s.start_time * s.time_base) for s in starts if s is not None and s.start_time is not None]
    return min(known, default=0.0)
