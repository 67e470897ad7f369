"""Packing, pass 1: what a video's container gives, or what stands in for it, and everything odd about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jmt_dist.affwild2.media import FALLBACK_FPS, GAP, MediaError, SoundStream, frame_timestamps, median_interval, read_audio, sound_stream
from jmt_dist.data.geometry import RATE

SHORTER = 0.1  # seconds by which sound must end before the pictures to be worth a note: encoders round to blocks of 23 ms

Noter = Callable[[str, str], None]  # takes (what, detail)


@dataclass
class Media:
    """`times` [F] in seconds, None where the container gives no frame; `pcm` is empty where there is no sound.

    `notes` are (what, detail) for the report, `error` says why the container gave nothing.
    """

    times: NDArray[np.float64] | None = None
    pcm: NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, np.int16))
    notes: list[tuple[str, str]] = field(default_factory=list)
    error: str = ""

    def note(self, what: str, detail: str) -> None:
        """Add to the notes."""
        self.notes.append((what, detail))


def read_media(path: Path | None) -> Media:
    """Timestamps and sound of a video, decoded once. Never fails for what is in the file."""
    media = Media()
    if path is None:
        media.note("no video file", "silence, 30 frames per second")
        return media
    try:
        media.times = frame_timestamps(path)
        _note_rate(media.times, media.note)
        stream, pcm = sound_stream(path), read_audio(path)
    except MediaError as error:
        media.note("unreadable sound" if media.times is not None else "unreadable video file", error.sentence)
        media.error = "" if media.times is not None else error.sentence
        return media
    if pcm is None:
        media.note("no audio stream" if stream is None else "empty audio stream", "silence")
        return media
    media.pcm = pcm
    if stream is not None:
        _note_sound(stream, len(pcm) / RATE, media.times, media.note)
    return media


def _note_rate(times: NDArray[np.float64], note: Noter) -> None:
    interval, steps = median_interval(times), np.diff(times)
    if len(steps) and steps.max() > 1.5 * interval:
        note("variable frame rate", f"longest interval {1000 * steps.max():.0f} ms")
    if abs(interval * FALLBACK_FPS - 1) > 0.01:
        note("frame rate other than 30", f"{1 / interval:.2f} per second")


def _note_sound(stream: SoundStream, seconds: float, times: NDArray[np.float64], note: Noter) -> None:
    if stream.rate != RATE:
        note("sound of another rate", f"{stream.rate} Hz")
    if stream.channels != 1:
        note("sound of several channels", f"{stream.channels}")
    if abs(stream.start) > GAP:
        note("sound offset", f"starts {abs(stream.start):.2f} s {'after' if stream.start > 0 else 'before'} the pictures")
    missing = float(times[-1]) + median_interval(times) - seconds
    if missing > SHORTER:
        note("sound shorter than the video", f"by {missing:.2f} s")
