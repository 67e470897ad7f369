"""The fixture on disk: layout, labels, crops, containers, gotchas; made once, the same for any number of workers."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from jmt_dist.affwild2 import fixture
from jmt_dist.affwild2.fixture import FixtureReport, cues_of, make_fixture, plan_fixture, unit_rows
from jmt_dist.affwild2.fixture_face import make_identity, render_blocks
from jmt_dist.affwild2.fixture_gotchas import COSTLY, HARMLESS, missing_frames
from jmt_dist.affwild2.fixture_plan import UnitPlan, VideoPlan
from jmt_dist.affwild2.fixture_voice import make_voice
from jmt_dist.affwild2.fixture_walk import stream
from jmt_dist.affwild2.labels import read_labels
from jmt_dist.affwild2.layout import find_dataset
from jmt_dist.affwild2.media import MediaError, frame_timestamps, read_audio
from jmt_dist.config import FixtureOptions
from jmt_dist.errors import UserError

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {"units": 3, "test_units": 1, "rows": 64, "gotchas": "none"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> FixtureReport:
    return make_fixture(FixtureOptions(out=str(tmp_path_factory.mktemp("made") / "all"), units=9, rows=64, gotchas="all", workers=2))


@pytest.fixture(scope="module")
def plans() -> dict[str, tuple[VideoPlan, UnitPlan]]:
    options = FixtureOptions(out="-", units=9, rows=64, gotchas="all")
    return {u.name: (v, u) for v in plan_fixture(options) for u in v.people}


@pytest.fixture(scope="module")
def by_gotcha(plans: dict[str, tuple[VideoPlan, UnitPlan]]) -> dict[str, tuple[VideoPlan, UnitPlan]]:
    return {u.gotcha: (v, u) for v, u in plans.values()}


def labels_of(root: Path, unit: UnitPlan) -> Path:
    folder = {"train": "Train_Set", "validation": "Validation_Set"}[unit.split]
    return root / "annotations" / "VA_Estimation_Challenge" / folder / f"{unit.name}.txt"


def media_of(root: Path, video: VideoPlan) -> Path:
    return root / video.batch / f"{video.stem}{video.suffix}"


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# ---- plan


def test_default_plan_is_the_dataset_in_small() -> None:
    options = FixtureOptions(out="-")
    videos = plan_fixture(options)
    units = [u for v in videos for u in v.people]
    ordinary = [u for u in units if not u.gotcha]
    assert Counter(u.split for u in ordinary) == {"train": 16, "validation": 8, "test": 2}
    assert len({u.name for u in units}) == len(units) == len({u.identity for u in units})
    fps = Counter(v.fps for v in videos if not v.people[0].gotcha)
    assert fps[30] > sum(fps.values()) / 2 and set(fps) == {15, 24, 25, 30, 60}
    pairs = [tuple(u.name.removeprefix(v.stem) for u in v.people) for v in videos if len(v.people) == 2]
    assert sorted(pairs) == [("", "_right"), ("_left", "_right")]
    assert {v.suffix for v in videos} == {".mp4", ".avi"} and {v.batch for v in videos} == {"batch1", "batch2"}
    families = Counter("id" if "x" in v.stem and "-" in v.stem else "video" if v.stem.startswith("video") else "number" for v in videos)
    assert len(families) == 3 and min(families.values()) >= 8
    assert all(f"-{v.fps}-" in v.stem for v in videos if "-" in v.stem)


@pytest.mark.parametrize("units", [3, 4, 5, 7, 24, 60])
def test_every_number_of_units_has_both_splits(units: int) -> None:
    people = [u for v in plan_fixture(FixtureOptions(out="-", units=units, gotchas="none", test_units=0)) for u in v.people]
    splits = Counter(u.split for u in people)
    assert len(people) == units and splits["validation"] == max(1, units // 3) and splits["train"] == units - splits["validation"]
    assert sorted(u.number for u in people) == list(range(units))


# ---- labels and layout


def test_the_tree_is_read_as_what_was_planned(made: FixtureReport, plans: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    dataset = find_dataset(made.out)
    found = {u.name: u for u in dataset.units}
    assert set(found) == set(plans) == set(made.units)
    for name, (video, unit) in plans.items():
        assert (found[name].video, found[name].split) == (video.stem, unit.split)
        assert found[name].rows == unit.rows
        assert (found[name].media is None) == (unit.gotcha == "no-media")
        assert len(found[name].crops) == {"no-crops": 0, "split-folder": 2}.get(unit.gotcha, 1)


def test_labels_are_the_walk_in_range(made: FixtureReport, plans: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    for video, unit in plans.values():
        if unit.split == "test":
            continue
        text = labels_of(made.out, unit).read_bytes()
        if unit.gotcha.startswith("label-"):
            continue
        lines = text.decode().split("\n")
        assert lines[0] == "valence,arousal" and lines[-1] == "" and len(lines) == unit.rows + 2
        va = read_labels(labels_of(made.out, unit))
        assert va.shape == (unit.rows, 2) and np.nanmax(np.abs(va)) <= 1
        wanted = unit_rows(0, video, unit).labels
        assert np.array_equal(np.isnan(va), np.isnan(wanted)) and np.nanmax(np.abs(va - wanted)) < 1e-6


def test_manifest_says_which_gotcha_is_where(made: FixtureReport) -> None:
    held = json.loads((made.out / "fixture.json").read_text())
    named = Counter(u["gotcha"] for u in held["units"].values() if u["gotcha"])
    assert named == Counter(g.name for g in (*HARMLESS, *COSTLY) for _ in g.people)
    assert all(u["meaning"] for u in held["units"].values() if u["gotcha"])
    assert held["ceiling"]["both"]["average"] == made.ceiling["both"]["average"]
    assert not (made.out / ".unfinished").exists()


def test_default_ceilings_are_where_the_design_wants_them() -> None:
    options = FixtureOptions(out="-")
    held = fixture._manifest(options, plan_fixture(options))
    for part in (held["ceiling"], held["ceiling_by_split"]["validation"]):
        assert 0.84 < part["both"]["average"] < 0.93
        assert part["visual"]["valence"] > 0.8 and part["visual"]["arousal"] < 0.6
        assert part["audio"]["arousal"] > 0.8 and part["audio"]["valence"] < 0.6


def test_test_units_have_a_list_and_a_sample_file_and_no_labels(made: FixtureReport, plans: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    names = sorted(n for n, (_, u) in plans.items() if u.split == "test")
    assert (made.out / fixture.TEST_LIST).read_text().splitlines() == names
    lines = (made.out / fixture.SAMPLE).read_text().splitlines()
    assert lines[0] == "image_location,valence,arousal"
    assert [line.split(",")[0] for line in lines[1:]] == [f"{n}/{k:05d}.jpg" for n in names for k in range(1, plans[n][1].rows + 1)]
    assert not [p for p in (made.out / "annotations").rglob("*.txt") if p.stem in names]


# ---- crops


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


def crops_of(root: Path, unit: UnitPlan) -> dict[int, Path]:
    folders = [root / "cropped_aligned" / unit.name, root / "cropped_aligned_new_50_vids" / unit.name]
    return {int(p.stem): p for folder in folders if folder.is_dir() for p in folder.iterdir()}


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


# ---- containers


def test_containers_hold_the_planned_streams(made: FixtureReport, plans: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    kinds = set()
    for video in {v.stem: v for v, _ in plans.values()}.values():
        if video.people[0].gotcha in ("unreadable-media", "no-media", "test-unreadable"):
            continue
        path = media_of(made.out, video)
        assert len(frame_timestamps(path)) == video.frames
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == {".mp4": "h264", ".avi": "mpeg4"}[video.suffix]
            if not video.variable and not video.sound.lead:
                assert float(container.streams.video[0].average_rate) == pytest.approx(video.fps, rel=0.01)
            assert len(container.streams.audio) == (video.sound.kind != "absent")
            for stream in container.streams.audio:
                kinds.add((stream.codec_context.name, stream.codec_context.sample_rate, stream.codec_context.channels))
                assert stream.codec_context.name == video.sound.codec
                assert (stream.codec_context.sample_rate, stream.codec_context.channels) == (video.sound.rate, video.sound.channels)
    assert {rate for _, rate, _ in kinds} >= {8_000, 16_000, 44_100, 48_000} and {c for _, _, c in kinds} == {1, 2}


def test_rows_and_frames_differ_as_named(made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    for gotcha, extra in (("rows-plus-1", 1), ("rows-plus-2", 2), ("rows-minus-1", -1), ("rows-plus-6", 6), ("rows-minus-5", -5)):
        video, unit = by_gotcha[gotcha]
        assert len(read_labels(labels_of(made.out, unit))) - len(frame_timestamps(media_of(made.out, video))) == extra


def lag(heard: np.ndarray, voice: np.ndarray) -> tuple[float, float]:
    """Seconds by which `heard` comes after `voice` (both at 44.1 kHz), and the correlation there."""
    size = 1 << (len(heard) + len(voice)).bit_length()
    cross = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(voice, size)), size)
    best = int(np.argmax(cross))
    return (best if best < size // 2 else best - size) / 44_100, float(cross[best] / np.sqrt((heard**2).sum() * (voice**2).sum()))


@pytest.mark.parametrize("gotcha", ["missing-crops", "rows-plus-1", "rows-plus-2", "rows-minus-1", "audio-late", "audio-early", "short"])
def test_sound_lies_where_the_pictures_need_it(made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]], gotcha: str) -> None:
    video, unit = by_gotcha[gotcha]
    heard = read_audio(media_of(made.out, video))
    first = frame_timestamps(media_of(made.out, video))[0]
    times, cues = cues_of(0, video, unit)
    seconds = times[video.frames - 1] + 1 / video.fps + video.sound.lead
    voice = make_voice(0, unit.name, unit.identity, seconds, times + video.sound.lead, cues.voice).astype(float)
    voice[: round(video.sound.start * 44_100)] = 0  # was not recorded
    assert heard is not None and first == pytest.approx(video.sound.lead, abs=0.002)
    delay, correlation = lag(heard.astype(float), voice)
    assert abs(delay) < 0.002 and correlation > 0.9


def test_odd_sound(made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    def heard(gotcha: str) -> np.ndarray | None:
        return read_audio(media_of(made.out, by_gotcha[gotcha][0]))

    assert heard("no-audio") is None and heard("audio-empty") is None
    short = heard("audio-short")
    assert short is not None and len(short) / 44_100 == pytest.approx(60 / 30 / 3, abs=0.05)
    for gotcha in ("unreadable-media", "test-unreadable"):
        with pytest.raises(MediaError):
            heard(gotcha)
    steps = np.diff(frame_timestamps(media_of(made.out, by_gotcha["variable-rate"][0])))
    assert steps.max() > 2 * steps.min() > 0


def test_odd_label_files(made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    def data(gotcha: str) -> bytes:
        return labels_of(made.out, by_gotcha[gotcha][1]).read_bytes()

    assert b"nan" in data("label-nan") and b"\r\n" in data("label-crlf") and not data("label-no-header").startswith(b"valence")
    assert len(read_labels(labels_of(made.out, by_gotcha["label-no-header"][1]))) == by_gotcha["label-no-header"][1].rows
    assert data("invalid-rows").count(b"-5,-5\n") == 12
    with pytest.raises(UserError, match="line 22"):
        read_labels(labels_of(made.out, by_gotcha["label-broken"][1]))


# ---- making


def test_same_bytes_for_any_number_of_workers_and_after_an_interruption(tmp_path: Path) -> None:
    make_fixture(FixtureOptions(out=str(tmp_path / "two"), workers=2, **TINY))
    reference = tree(tmp_path / "two")

    def stop(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    options = FixtureOptions(out=str(tmp_path / "one"), workers=1, **TINY)
    with pytest.raises(KeyboardInterrupt):
        make_fixture(options, stop)
    assert not (tmp_path / "one" / "fixture.json").exists()
    # what a kill in the midst of the third video may leave behind
    third = plan_fixture(options)[2].people[0].name
    (tmp_path / "one" / "cropped_aligned" / third).mkdir()
    (tmp_path / "one" / "cropped_aligned" / third / "00099.jpg").write_bytes(b"rest")
    done: list[int] = []
    assert make_fixture(options, lambda k, total, name: done.append(k)).made
    assert done == [3, 4]  # two were there
    assert tree(tmp_path / "one") == reference

    other = {**TINY, "seed": 1}
    make_fixture(FixtureOptions(out=str(tmp_path / "other"), workers=1, **other))
    changed = tree(tmp_path / "other")
    assert changed.keys() == reference.keys() and all(changed[p] != reference[p] for p in changed if p.endswith(".jpg"))


def test_second_run_does_nothing_and_others_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "f"
    make_fixture(FixtureOptions(out=str(out), workers=1, **TINY))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again = make_fixture(FixtureOptions(out=str(out), workers=2, **TINY), lambda *_: pytest.fail("made something"))
    assert not again.made and again.ceiling["both"]["average"] > 0 and len(again.units) == 4
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(UserError, match=r"other options \(rows=64\)"):
        make_fixture(FixtureOptions(out=str(out), workers=1, **{**TINY, "rows": 65}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty and not a fixture"):
        make_fixture(FixtureOptions(out=str(tmp_path / "mine"), **TINY))
    with pytest.raises(UserError, match="is a file"):
        make_fixture(FixtureOptions(out=str(tmp_path / "mine" / "thesis.tex"), **TINY))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_program(tmp_path: Path) -> None:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "shards/make_fixture.py", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    words = [f"out={tmp_path / 'f'}", "units=3", "rows=64", "test_units=0", "gotchas=none"]
    first = call(*words)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert "3 units (2 train, 1 validation, 0 test" in lines[0] and lines[-1] == str(tmp_path / "f")
    assert "3/3 videos" in lines and any(line.split()[0] == "both" for line in lines)
    assert "nothing to do" in call(*words).stdout
    wrong = call(*words, "unit=3")
    assert wrong.returncode == 2 and "`units`" in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1
