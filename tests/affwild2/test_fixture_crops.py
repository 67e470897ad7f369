"""The fixture's face crops: ordinary ones as the dataset's, spoiled ones as each irregularity says."""

from __future__ import annotations

import io
import os

import pytest
from PIL import Image

from jmt_dist.affwild2.fixture import FixtureReport, cues_of, plan_fixture, unit_rows
from jmt_dist.affwild2.fixture_face import make_identity, render_blocks
from jmt_dist.affwild2.fixture_gotchas import missing_frames
from jmt_dist.affwild2.fixture_plan import UnitPlan, VideoPlan
from jmt_dist.affwild2.fixture_walk import stream
from jmt_dist.affwild2.labels import read_labels
from jmt_dist.affwild2.media import frame_timestamps
from jmt_dist.config import FixtureOptions

from .made import crops_of, labels_of, media_of


def segments(data: bytes) -> list[tuple[int, bytes]]:
    """(marker, payload) of a JPEG's segments up to the scan."""
    found, at = [], 2
    while data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    return found


def huffman_counts(data: bytes) -> dict[int, tuple[int, ...]]:
    tables: dict[int, tuple[int, ...]] = {}
    for marker, payload in segments(data):
        while marker == 0xC4 and payload:
            counts = tuple(payload[1:17])
            tables[payload[0]] = counts
            payload = payload[17 + sum(counts) :]
    return tables


# ITU T.81, tables K.3 to K.6: how many codes of each length 1..16
STANDARD_TABLES = {
    0x00: (0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0),
    0x01: (0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0),
    0x10: (0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125),
    0x11: (0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 119),
}


def test_ordinary_crops_are_baseline_420_with_standard_tables(made: FixtureReport, plans: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    for video, unit in plans.values():
        if unit.gotcha:
            continue
        files = sorted((made.out / "cropped_aligned" / unit.name).iterdir())
        assert [f.name for f in files] == [f"{k:05d}.jpg" for k in range(1, video.frames + 1)]
        data = files[0].read_bytes()
        frame = next(payload for marker, payload in segments(data) if marker == 0xC0)  # baseline
        assert frame[1:5] == bytes([0, 112, 0, 112]) and frame[5] == 3 and [frame[7], frame[10], frame[13]] == [0x22, 0x11, 0x11]
        assert huffman_counts(data) == STANDARD_TABLES
        tables = {tuple(p for m, p in segments(f.read_bytes()) if m == 0xDB) for f in files[::20]}
        assert len(tables) == 1  # one quality per unit


def test_missing_crops(made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    video, unit = by_gotcha["missing-crops"]
    absent = set(range(1, video.frames + 1)) - set(crops_of(made.out, unit))
    assert absent == missing_frames("missing-crops", video.frames) and {1, video.frames} <= absent
    shown = unit_rows(0, video, unit).face
    assert not shown[[k - 1 for k in absent]].any() and shown[1].any()


def test_spoiled_crops(made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    def image(gotcha: str, frame: int) -> Image.Image:
        return Image.open(crops_of(made.out, by_gotcha[gotcha][1])[frame])

    assert image("jpeg-wrong-size", 5).size == (128, 128) and image("jpeg-wrong-size", 16).size == (96, 112)
    assert image("jpeg-grayscale", 1).mode == "L" and image("jpeg-grayscale", 2).mode == "RGB"
    assert image("jpeg-progressive", 1).info.get("progressive")
    assert image("jpeg-444", 1).layer[0][1:3] == (1, 1)  # type: ignore[attr-defined]
    assert huffman_counts(crops_of(made.out, by_gotcha["jpeg-optimised"][1])[1].read_bytes()) != STANDARD_TABLES
    assert image("jpeg-quality", 1).quantization != image("jpeg-quality", 2).quantization  # type: ignore[attr-defined]
    broken = crops_of(made.out, by_gotcha["jpeg-corrupt"][1])
    for frame in (8, 16, 24):
        with pytest.raises(OSError):
            Image.open(io.BytesIO(broken[frame].read_bytes())).load()


def test_folders_and_links(made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    video, unit = by_gotcha["symbolic-link"]
    assert media_of(made.out, video).is_symlink() and (made.out / "cropped_aligned" / unit.name).is_symlink()
    assert len(frame_timestamps(media_of(made.out, video))) == video.frames == len(crops_of(made.out, unit))
    _, split = by_gotcha["split-folder"]
    first, second = (len(list((made.out / f / split.name).iterdir())) for f in ("cropped_aligned", "cropped_aligned_new_50_vids"))
    assert first and second and first + second == by_gotcha["split-folder"][0].frames
    assert not (made.out / "cropped_aligned" / by_gotcha["new-folder"][1].name).exists()
    assert "." in by_gotcha["name-with-dot"][1].name and " " in by_gotcha["name-with-space"][1].name


def test_doubles_names_in_other_bytes_and_the_third_kind_of_pair(
    made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]]
) -> None:
    video, unit = by_gotcha["duplicate"]
    first = labels_of(made.out, unit)
    second = first.parent.with_name("Validation_Set") / first.name
    assert (len(read_labels(first)), len(read_labels(second))) == (60, 30)
    assert (made.out / "batch1" / f"{video.stem}.mp4").read_bytes() == (made.out / "batch2" / f"{video.stem}.mp4").read_bytes()
    video, unit = by_gotcha["name-not-utf8"]
    assert os.fsencode(media_of(made.out, video)).endswith(b"caf\xe9.mp4")
    assert len(frame_timestamps(media_of(made.out, video))) == len(crops_of(made.out, unit)) == len(read_labels(labels_of(made.out, unit)))
    with pytest.raises(UnicodeEncodeError):
        unit.name.encode()
    video, _ = by_gotcha["main-and-left"]
    main, left = video.people
    assert (main.name, left.name) == (video.stem, f"{video.stem}_left")
    assert [len(crops_of(made.out, person)) for person in video.people] == [48, 48]
    assert crops_of(made.out, main)[1].read_bytes() != crops_of(made.out, left)[1].read_bytes()
    assert not list((made.out / "batch2").glob(f"{video.stem}_left.*"))  # one video, under the main name


# drawn when the figures in README and benchmarks/results were measured: place of the video, then of its last unit valence of row 1,
# arousal of row 101, the face's valence cue of row 201, the voice's arousal cue of row 256, and the mean of crop 4
LEARNT = (
    (0, 0.241004, 0.886138, -0.250555, 0.490894, 95.635),
    (5, 0.762844, -0.298, 0.303005, 0.59276, 109.799),
)


def test_what_is_learnt_does_not_change_with_what_is_added() -> None:
    """No gotcha may move a random stream of the ordinary units."""
    plain, every = (plan_fixture(FixtureOptions(out="-", test_units=0, gotchas=gotchas)) for gotchas in ("none", "all"))
    assert every[: len(plain)] == plain
    assert stream(0, "837", "levels", 3).integers(0, 10**9, 3).tolist() == [666309597, 624741966, 514720263]
    for place, *wanted in LEARNT:
        video = plain[place]
        unit = video.people[-1]
        times, cues = cues_of(0, video, unit)
        crop = next(iter(render_blocks(0, unit.name, make_identity(0, unit.identity), times[:8], cues.face[:8])))[3]
        found = [cues.valence[0], cues.arousal[100], cues.face[200, 0], cues.voice[255, 1], crop.mean()]
        assert found == pytest.approx(wanted, abs=1e-2)  # a pixel may round otherwise on another processor
        assert found[:4] == pytest.approx(wanted[:4], abs=1e-5)
