"""The irregularities of the real dataset, one tiny unit each, and what each does to the files.

`HARMLESS` cost no unit; `COSTLY` may, or need a fallback. Every unit's gotcha is named in fixture.json.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jmt_dist.affwild2.fixture_plan import Sound, Split, UnitPlan, VideoPlan, stem_of

HEADER = "valence,arousal"
_STANDARD: Mapping[str, Any] = {"subsampling": 2, "optimize": False, "progressive": False}


@dataclass(frozen=True)
class Gotcha:
    """A tiny unit that is irregular in one way (and, among the harmless ones, odd in its sound)."""

    name: str
    text: str
    rows: int
    extra: int = 0  # label rows more than video frames
    fps: int = 30
    split: Split = "train"
    suffix: Literal[".mp4", ".avi"] = ".mp4"
    sound: Sound = field(default_factory=Sound)
    stem: str = ""
    variable: bool = False
    people: tuple[str, ...] = ("",)  # suffixes of the units of its video


_AVI = Sound("pcm_s16le")
HARMLESS = (
    Gotcha("rows-plus-1", "one label row more than frames; stereo, 48 kHz", 97, 1, sound=Sound(rate=48_000, channels=2)),
    Gotcha("rows-plus-2", "two label rows more than frames; 16 kHz", 82, 2, 25, suffix=".avi", sound=Sound("pcm_s16le", rate=16_000)),
    Gotcha("rows-minus-1", "one label row less than frames; 8 kHz", 75, -1, 24, suffix=".avi", sound=Sound("pcm_s16le", rate=8_000)),
    Gotcha("missing-crops", "frames without a face: no crop", 90, split="validation", sound=Sound(channels=2)),
    Gotcha("invalid-rows", "-5 at start and end", 64, fps=15),
    Gotcha("no-audio", "no audio stream", 60, sound=Sound(kind="absent")),
    Gotcha("short", "shorter than a segment and odd in length", 41, fps=60, split="validation", suffix=".avi", sound=_AVI),
)
COSTLY = (
    Gotcha("jpeg-corrupt", "truncated, empty and scrambled JPEGs", 48),
    Gotcha("jpeg-wrong-size", "crops of another size", 44),
    Gotcha("jpeg-grayscale", "grayscale crops", 44),
    Gotcha("jpeg-progressive", "progressive crops", 44),
    Gotcha("jpeg-444", "crops without chroma subsampling", 44),
    Gotcha("jpeg-optimised", "crops with Huffman tables of their own", 44),
    Gotcha("jpeg-quality", "quality changes within the unit", 44),
    Gotcha("no-crops", "no crop folder", 44),
    Gotcha("unreadable-media", "the container is rubbish", 44),
    Gotcha("no-media", "the media file is missing", 44),
    Gotcha("rows-plus-6", "six label rows more than frames", 50, 6),
    Gotcha("rows-minus-5", "five label rows less than frames", 50, -5),
    Gotcha("label-nan", "NaN in a label", 44),
    Gotcha("label-out-of-range", "labels outside [-1, 1]", 44),
    Gotcha("label-no-header", "no header line", 44),
    Gotcha("label-crlf", "CRLF line ends and blank lines at the end", 44),
    Gotcha("label-broken", "a label row that is not two numbers", 44),
    Gotcha("audio-empty", "an audio stream without a packet", 44, suffix=".avi", sound=Sound("pcm_s16le", kind="empty")),
    Gotcha("audio-late", "audio starts 0.4 s after the pictures", 60, sound=Sound(start=0.4)),
    Gotcha("audio-early", "audio starts 0.3 s before the pictures", 60, sound=Sound(lead=0.3)),
    Gotcha("audio-short", "audio ends after a third of the video", 60, suffix=".avi", sound=Sound("pcm_s16le", share=1 / 3)),
    Gotcha("variable-rate", "variable frame rate", 60, variable=True),
    Gotcha("name-with-dot", "a dot in the name", 44, stem="video390.v2"),
    Gotcha("name-with-space", "a space in the name", 44, stem="video 391"),
    Gotcha("symbolic-link", "media file and crop folder are links", 44),
    Gotcha("new-folder", "crops in cropped_aligned_new_50_vids", 44),
    Gotcha("split-folder", "crops in both crop folders", 44, split="validation"),
    Gotcha("test-unreadable", "a test unit with an unreadable container and one crop gone", 44, 1, split="test"),
    # what comes later stands at the end: a unit's number sets its looks and levels
    Gotcha("duplicate", "labels in both sets, the video in both batches", 60),
    Gotcha("name-not-utf8", "a name that is not UTF-8", 44, stem=os.fsdecode(b"video392-caf\xe9")),
    Gotcha("main-and-left", "two people, one of them under the video's own name", 48, people=("", "_left")),
)
_BY_NAME = {g.name: g for g in (*HARMLESS, *COSTLY)}


def plan_gotchas(level: Literal["none", "harmless", "all"], first: int) -> list[VideoPlan]:
    """One video per gotcha; their people are numbered from `first`."""
    if level == "none":
        return []
    chosen = HARMLESS + (COSTLY if level == "all" else ())
    firsts = np.cumsum([first, *(len(g.people) for g in chosen)])
    return [_plan(g, k, int(firsts[k]), costly=k >= len(HARMLESS)) for k, g in enumerate(chosen)]


def _plan(g: Gotcha, place: int, first: int, costly: bool) -> VideoPlan:
    stem = g.stem or stem_of(100 + place, g.fps)
    people = tuple(UnitPlan(stem + side, g.split, g.rows, first + k, first + k, g.name) for k, side in enumerate(g.people))
    batch: Literal["batch1", "batch2"] = "batch1" if g.name == "duplicate" else "batch2"
    return VideoPlan(stem, g.suffix, batch, g.fps, g.rows - g.extra, g.sound, people, g.variable, costly)


def text_of(name: str) -> str:
    """What a gotcha is, in words; empty for an ordinary unit."""
    return _BY_NAME[name].text if name else ""


def missing_frames(gotcha: str, frames: int) -> frozenset[int]:
    """1-based frames without a crop."""
    if gotcha == "missing-crops":
        return frozenset({1, 20, 33, 34, *range(50, 62), frames})
    if gotcha == "test-unreadable":
        return frozenset({7})
    return frozenset(range(1, frames + 1)) if gotcha == "no-crops" else frozenset()


def invalid_rows(gotcha: str, rows: int) -> NDArray[np.bool_]:
    """Rows [N] written as -5."""
    mask = np.zeros(rows, bool)
    if gotcha == "invalid-rows":
        mask[:7] = mask[-5:] = True
    return mask


def label_file(gotcha: str, labels: NDArray[np.float64], decimals: int) -> bytes:
    """The label file of labels [N, 2] (NaN: -5), as this gotcha spells it."""
    lines = ["-5,-5" if np.isnan(v + a) else f"{v:.{decimals}f},{a:.{decimals}f}" for v, a in labels]
    if gotcha == "label-nan":
        lines[9] = "nan," + lines[9].split(",")[1]
    elif gotcha == "label-out-of-range":
        lines[3], lines[30] = "1.5,0.2", "0.1,-30"
    elif gotcha == "label-broken":
        lines[20] = "0.25;0.1 ?"
    if gotcha != "label-no-header":
        lines.insert(0, HEADER)
    if gotcha == "label-crlf":
        return ("\r\n".join(lines) + "\r\n\r\n\r\n").encode()
    return ("\n".join(lines) + "\n").encode()


def encode_crop(gotcha: str, frame: int, pixels: NDArray[np.uint8], quality: int) -> bytes:
    """The JPEG of source frame `frame`, pixels [112, 112, 3], as this gotcha spoils it."""
    settings: dict[str, Any] = {**_STANDARD, "quality": quality}
    image = Image.fromarray(pixels)
    if gotcha == "jpeg-wrong-size" and frame % 11 == 5:
        image = image.resize((128, 128) if frame % 2 else (96, 112))
    elif gotcha == "jpeg-grayscale" and frame % 2:
        image = image.convert("L")
        del settings["subsampling"]
    elif gotcha == "jpeg-quality":
        settings["quality"] = quality - 10 * (frame % 3)
    elif gotcha in _JPEG_SETTINGS:
        settings |= _JPEG_SETTINGS[gotcha]
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **settings)
    data = buffer.getvalue()
    return _corrupt(frame, data) if gotcha == "jpeg-corrupt" else data


_JPEG_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "jpeg-progressive": {"progressive": True},
    "jpeg-444": {"subsampling": 0},
    "jpeg-optimised": {"optimize": True},
}


def _corrupt(frame: int, data: bytes) -> bytes:
    if frame == 8:
        return data[: len(data) // 2]
    if frame == 16:
        return b""
    if frame == 24:
        return bytes(np.random.default_rng(24).integers(0, 256, 2000, np.uint8))
    if frame == 32:  # the scan goes on, but says something else
        middle = len(data) * 2 // 3
        return data[:middle] + bytes(np.random.default_rng(32).integers(0, 255, 400, np.uint8)) + data[middle + 400 :]
    return data
