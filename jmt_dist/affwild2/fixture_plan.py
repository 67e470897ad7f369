"""Which videos and units the fixture has: names, splits, frame rates, sound, and who is in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jmt_dist.affwild2.fixture_walk import Array, stream
from jmt_dist.config import FixtureOptions

Split = Literal["train", "validation", "test"]
SIZE_NAME = "160x120"  # of the videos
_FPS = (30, 30, 25, 30, 30, 30, 24, 30, 30, 60, 30, 30, 25, 30, 15, 30)  # mostly 30, as in the dataset


@dataclass(frozen=True)
class Sound:
    """The sound track of a video: what is recorded, how, and when. `start` and `lead` are seconds."""

    codec: Literal["aac", "pcm_s16le"] = "aac"
    rate: int = 44_100
    channels: int = 1
    kind: Literal["voice", "absent", "empty"] = "voice"
    start: float = 0.0  # the track begins so long after the pictures
    lead: float = 0.0  # the track begins so long before the pictures
    share: float = 1.0  # of the video's length


@dataclass(frozen=True)
class UnitPlan:
    """One annotated face: `number` sets the levels of its walks, `identity` its looks and voice."""

    name: str
    split: Split
    rows: int
    number: int
    identity: int
    gotcha: str = ""


@dataclass(frozen=True)
class VideoPlan:
    """One media file with the people in it; the first is the one who speaks."""

    stem: str
    suffix: Literal[".mp4", ".avi"]
    batch: Literal["batch1", "batch2"]
    fps: int
    frames: int
    sound: Sound
    people: tuple[UnitPlan, ...]
    variable: bool = False
    costly: bool = False  # one of the gotchas that may cost a unit

    def times(self, count: int) -> Array:
        """Seconds [count] of the first frames, from 0, continued past the last one."""
        if not self.variable:
            return np.arange(count) / self.fps
        steps = stream(0, self.stem, "intervals").choice([20, 33, 34, 50, 67], size=count) / 1000
        return np.concatenate([[0.0], np.cumsum(steps)[:-1]])


def sound_of(number: int, suffix: str) -> Sound:
    """Sound as it comes: AAC in MP4, PCM in AVI, 44.1 kHz mostly."""
    if suffix == ".avi":
        return Sound("pcm_s16le", rate=(44_100, 22_050, 44_100)[number % 3], channels=1 + number % 2)
    return Sound("aac", rate=(44_100, 44_100, 48_000, 44_100)[number % 4], channels=(1, 2, 2)[number % 3])


def stem_of(number: int, fps: int) -> str:
    """Name of video `number` in one of the dataset's three families, beyond the numbers that the dataset uses."""
    return (f"{700 + number}", f"video{200 + number}", f"{300 + number}-{fps}-{SIZE_NAME}")[number % 3]


def _groups(split: Split, units: int) -> list[tuple[str, ...]]:
    """Suffixes of the people of each video; one video with two people where there are enough units."""
    if split == "train" and units >= 4:
        return [("_left", "_right"), *[("",)] * (units - 2)]
    if split == "validation" and units >= 3:
        return [("",), ("", "_right"), *[("",)] * (units - 3)]
    return [("",)] * units


def _interleaved(options: FixtureOptions) -> list[tuple[Split, tuple[str, ...]]]:
    """Videos of both splits in turn, so that levels and looks, which run through the numbers, are alike in both."""
    held = max(1, options.units // 3)
    train, validation = _groups("train", options.units - held), _groups("validation", held)
    order: list[tuple[float, Split, tuple[str, ...]]] = [((k + 0.5) / len(train), "train", g) for k, g in enumerate(train)]
    order += [((k + 0.5) / len(validation), "validation", g) for k, g in enumerate(validation)]
    return [(split, group) for _, split, group in sorted(order)] + [("test", ("",))] * options.test_units


def plan_videos(options: FixtureOptions) -> list[VideoPlan]:
    """The ordinary videos: `units` annotated units in about 2/3 train and 1/3 validation, and `test_units` without labels."""
    plans: list[VideoPlan] = []
    unit = 0
    for number, (split, suffixes) in enumerate(_interleaved(options)):
        fps = _FPS[number % len(_FPS)]
        stem = stem_of(number, fps)
        suffix: Literal[".mp4", ".avi"] = ".avi" if number % 3 == 0 else ".mp4"
        extra = 1 if split == "test" and options.gotchas != "none" else 0  # the sample file has one row more than the video frames
        people = tuple(UnitPlan(stem + s, split, options.rows, unit + k, unit + k) for k, s in enumerate(suffixes))
        unit += len(people)
        batch: Literal["batch1", "batch2"] = "batch2" if number % 9 == 5 else "batch1"
        plans.append(VideoPlan(stem, suffix, batch, fps, options.rows - extra, sound_of(number, suffix), people))
    return plans
