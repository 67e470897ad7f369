"""New material as the packer would see it: aligned face crops, and a video or its sound; without shards (DESIGN sections 4 and 5)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jmt_dist.affwild2.media import end_samples, frame_timestamps, median_interval, read_audio
from jmt_dist.data.geometry import SIZE, WINDOW, end_frames, samples_of, strip_frames
from jmt_dist.data.sound import spectrograms
from jmt_dist.errors import UserError

MORE = 2  # crops may be numbered so far past the video's last frame: row counts of the dataset differ by as much
_CROP = re.compile(r"(\d+)\.(jpe?g|png)", re.IGNORECASE)


@dataclass(frozen=True)
class Material:
    """One face track of `rows` frames: where its crops are (by frame, from 1), its frames' times [F] in seconds, its sound.

    `notes`: what was missing and what stands in for it.
    """

    rows: int
    crops: dict[int, Path]
    times: NDArray[np.float64]
    pcm: NDArray[np.int16]
    notes: tuple[str, ...] = ()

    @cached_property
    def _interval(self) -> float:
        return median_interval(self.times)

    def samples(self) -> Iterator[tuple[tuple[int, int], NDArray[np.uint8], Tensor]]:
        """((m, p), strip [71, 112, 112, 3] RGB, spectrograms [64, 64, 107]) of each sample; frames without a crop are black."""
        for m, p in samples_of(self.rows):
            strip = np.stack([self._picture(int(frame)) for frame in strip_frames(m, p)])
            stops = end_samples(self.times, end_frames(m, p), interval=self._interval)
            start = int(stops.min()) - WINDOW
            sound = torch.from_numpy(self._sound(start, int(stops.max())))
            yield (m, p), strip, spectrograms([sound], torch.from_numpy(stops - start)[None])[0]

    def _picture(self, frame: int) -> NDArray[np.uint8]:
        from PIL import Image

        path = self.crops.get(frame)
        if path is None:
            return np.zeros((SIZE, SIZE, 3), np.uint8)
        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")
                return np.asarray(picture if picture.size == (SIZE, SIZE) else picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} is not a picture: {error}", "Remove it, and its frame is taken as one without a face.") from None

    def _sound(self, start: int, stop: int) -> NDArray[np.int16]:
        """Samples [stop - start] from `start` on, silence where there are none."""
        found = np.zeros(stop - start, np.int16)
        first, last = max(start, 0), min(stop, len(self.pcm))
        if first < last:
            found[first - start : last - start] = self.pcm[first:last]
        return found


def read_material(crops: Path, media: Path | None, fps: float = 30.0) -> Material:
    """The material of a folder of crops `00001.jpg`, … (numbered as the video's frames, from 1) and a video, or its sound alone.

    The frames of the video are the rows; without one, the highest crop number, at `fps`. Raises UserError: no crop, a number
    that two files have, crops numbered past the video's end, media that cannot be read.
    """
    found = _crops(crops)
    notes: list[str] = []
    times: NDArray[np.float64] | None = None
    pcm: NDArray[np.int16] | None = None
    if media is not None:
        if not media.is_file():
            raise UserError(f"there is no file {media}", "Name the video, or its sound as WAV.")
        times, pcm = _times(media), read_audio(media)
    last = max(found)
    if times is not None and last > len(times) + MORE:
        remedy = "Crops are numbered as the frames of the video, from 1."
        raise UserError(f"{crops} has a crop of frame {last}, but {media} has {len(times)} frames", remedy)
    if times is None:
        times = np.arange(last, dtype=np.float64) / fps
        notes.append(f"no video: {fps:g} frames per second")
    if pcm is None:
        pcm = np.zeros(0, np.int16)
        notes.append("no sound: silence")
    rows = max(len(times), last)
    if len(found) < rows:
        notes.append(f"{rows - len(found)} of {rows} frames have no crop: black")
    return Material(rows, found, times, pcm, tuple(notes))


def _times(media: Path) -> NDArray[np.float64] | None:
    """Times of the video's frames; None for a file of sound alone."""
    import av

    try:
        with av.open(str(media), metadata_errors="replace") as container:
            if not container.streams.video or all(stream.disposition & 0x400 for stream in container.streams.video):  # a cover picture
                return None
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{media} cannot be read: {getattr(error, 'strerror', None) or error}", "Give a video, or WAV.") from None
    return frame_timestamps(media)


def _crops(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", "Give the folder of the face crops 00001.jpg, 00002.jpg, …")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _CROP.fullmatch(path.name)
        number = int(match[1]) if match else 0
        if number in found:
            raise UserError(f"{found[number]} and {path} are both frame {number}", "Remove one of them.")
        if number > 0:
            found[number] = path
    if not found:
        raise UserError(f"{folder} holds no crop", "Crops are named 00001.jpg, 00002.jpg, … after the frames, from 1.")
    return found
