"""Containers with known frame times and known sound, for the tests of this room."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from jmt_dist.affwild2.media import RATE

PICTURE = np.full((64, 64, 3), 90, np.uint8)


def click(seconds: float, at: float, rate: int, channels: int = 1) -> NDArray[np.int16]:
    """Silence with one click of 0.5 ms at `at` seconds, int16 [samples, channels]."""
    sound = np.zeros((round(seconds * rate), channels), np.int16)
    start = round(at * rate)
    sound[start : start + max(rate // 2000, 1)] = 20_000
    return sound


def write(
    path: Path,
    *,
    times: NDArray[np.float64] | None = None,
    codec: str = "libx264",
    sound: NDArray[np.int16] | None = None,
    audio_codec: str = "aac",
    rate: int = RATE,
    audio_start: float = 0.0,
    holes: list[tuple[float, float]] | None = None,
    clock: int = 1000,
    options: dict[str, str] | None = None,
) -> Path:
    """A file with frames at `times` seconds and `sound` [samples, channels] from `audio_start`; holes of it are not written."""
    with av.open(str(path), "w", options=options or {}) as container:
        streams = []
        if times is not None:
            video = container.add_stream(codec, rate=30)
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
            video.codec_context.time_base = Fraction(1, clock)
            streams.append((video, pictures(times, clock)))
        if sound is not None:
            audio = container.add_stream(audio_codec, rate=rate, layout="stereo" if sound.shape[1] == 2 else "mono")
            streams.append((audio, pieces(sound, rate, audio.codec_context.frame_size or 1024, audio_start, holes or [])))
        for stream, frames in streams:
            for frame in [*frames, None]:
                container.mux(stream.encode(frame))
    return path


def pictures(times: NDArray[np.float64], clock: int) -> list[av.VideoFrame]:
    frames = []
    for i, time in enumerate(times):
        frame = av.VideoFrame.from_ndarray(np.roll(PICTURE, i, axis=2) + np.uint8(i % 50), "rgb24")
        frame.pts, frame.time_base = round(time * clock), Fraction(1, clock)
        frames.append(frame)
    return frames


def pieces(sound: NDArray[np.int16], rate: int, size: int, start: float, holes: list[tuple[float, float]]) -> list[av.AudioFrame]:
    frames = []
    for first in range(0, len(sound), size):
        if any(a <= first / rate < b for a, b in holes):
            continue
        part = np.ascontiguousarray(sound[first : first + size])
        frame = av.AudioFrame.from_ndarray(part.reshape(1, -1), "s16", "stereo" if sound.shape[1] == 2 else "mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, first + round(start * rate), Fraction(1, rate)
        frames.append(frame)
    return frames


STEADY = np.arange(50) / 25
