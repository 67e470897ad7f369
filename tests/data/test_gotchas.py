"""Every irregularity of the real dataset: a rule, and a line in both reports. One tree of tiny units, packed once."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from jmt_dist.affwild2.layout import find_dataset
from jmt_dist.config import VerifyOptions
from jmt_dist.data.pack import pack
from jmt_dist.data.pack_guard import nameless
from jmt_dist.data.report import PackReport
from jmt_dist.data.rules import RULES
from jmt_dist.data.sample import Sample, decode_audio, parse_key
from jmt_dist.data.verify import verify
from jmt_dist.errors import UserError

from ..affwild2.containers import click, write
from . import tree as made
from .packing import options, quiet, samples

TRAIN, VALIDATION = Path(made.LABELS) / "Train_Set", Path(made.LABELS) / "Validation_Set"
NOT_UTF8 = os.fsdecode(b"caf\xe9")
SPLITS = {f"frames{d:+d}": d for d in range(-4, 4)}  # rows minus frames
RATES = (14, 15, 17, 24, 25, 29, 60)
SOUNDS = {"mono8": (8_000, 1), "stereo16": (16_000, 2), "mono22": (22_050, 1), "stereo48": (48_000, 2)}


@dataclass(frozen=True)
class Case:
    """The packed tree: its report, what was printed, and its samples by key."""

    root: Path
    out: Path
    report: PackReport
    said: tuple[str, ...]
    samples: dict[str, Sample]

    def details(self, what: str) -> dict[str, str]:
        return {note.unit: note.detail for note in self.report.all_notes() if note.what == what}

    def of(self, unit: str) -> list[Sample]:
        return [sample for text, sample in self.samples.items() if parse_key(text)[0] == unit]


def labels(root: Path, split: Path, name: str, rows: int, text: str | None = None) -> None:
    (root / split).mkdir(parents=True, exist_ok=True)
    lines = "valence,arousal\n" + "".join(f"0.{i % 9},-0.{i % 7}\n" for i in range(rows))
    (root / split / f"{name}.txt").write_bytes((lines if text is None else text).encode())


def unit(root: Path, name: str, rows: int = 12, split: Path = TRAIN, first: int = 1) -> None:
    """Labels and crops without a video."""
    labels(root, split, name, rows)
    crops(root / "cropped_aligned" / name, rows, first)


FILES = [made.jpeg(made.picture(k)) for k in range(3)]


def crops(folder: Path, count: int, first: int = 1) -> None:
    folder.mkdir(parents=True)
    for frame in range(first, first + count):
        (folder / f"{frame:05d}.jpg").write_bytes(FILES[frame % 3])


def write_rows_and_rates(root: Path) -> None:
    for name, difference in SPLITS.items():
        unit(root, name)
        made.write_video(root / "batch1" / f"{name}.avi", 12 - difference, 30, made.sound(1, 0.5))
    for fps in RATES:
        unit(root, f"9-{fps}-64x64", 70)
        made.write_video(root / "batch2" / f"9-{fps}-64x64.avi", 70, fps, made.sound(fps, 70 / fps))


def write_sounds(root: Path) -> None:
    for name, (rate, channels) in SOUNDS.items():
        unit(root, name, 60)
        heard = click(2.0, 1.0, rate, channels)
        write(root / "batch1" / f"{name}.mkv", times=np.arange(60) / 30, sound=heard, audio_codec="pcm_s16le", rate=rate)
        (root / "batch1" / f"{name}.mkv").rename(root / "batch1" / f"{name}.avi")  # a container is what its bytes say


def write_people_and_names(root: Path) -> None:
    for video, names in (("two", ("two_left", "two_right")), ("main", ("main", "main_right")), ("left", ("left", "left_left"))):
        for name in names:
            unit(root, name)
        made.write_video(root / "batch1" / f"{video}.avi", 12, 30, made.sound(5, 0.4))
    for name in ("a.b", "a b", "größe"):
        unit(root, name)
        made.write_video(root / "batch1" / f"{name}.avi", 12, 30, made.sound(6, 0.4))
    unit(root, NOT_UTF8)
    made.write_video(root / "batch1" / "plain.avi", 12, 30, None)
    (root / "batch1" / "plain.avi").rename(root / "batch1" / f"{NOT_UTF8}.avi")
    long = "n" * 81
    unit(root, long)


def write_links_and_doubles(root: Path) -> None:
    unit(root, "linked")
    store = root / "store"
    store.mkdir()
    for path in (root / TRAIN / "linked.txt", root / "cropped_aligned" / "linked"):
        path.rename(store / path.name)
        path.symlink_to(store / path.name)
    unit(root, "dangling")
    crop = root / "cropped_aligned" / "dangling" / "00003.jpg"
    crop.unlink()
    crop.symlink_to("nowhere.jpg")
    (root / "batch1" / "dangling.avi").symlink_to("nowhere.avi")
    (root / "loop").symlink_to("loop")
    (root / "cropped_aligned" / "loop").symlink_to("loop")
    labels(root, TRAIN, "loop", 12)
    unit(root, "twice")
    labels(root, VALIDATION, "twice", 9)
    for batch in ("batch1", "batch2"):
        made.write_video(root / batch / "twice.avi", 12, 30, None)
    unit(root, "zero", first=0)  # 00000.jpg to 00011.jpg
    unit(root, "gaps")
    for frame in (1, 5, 6, 12):
        (root / "cropped_aligned" / "gaps" / f"{frame:05d}.jpg").unlink()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    base = tmp_path_factory.mktemp("gotchas")
    root, out, said = base / "tree", base / "shards", []
    write_rows_and_rates(root)
    write_sounds(root)
    write_people_and_names(root)
    write_links_and_doubles(root)
    packed = pack(options(root, out, samples_per_shard=64, workers=2), said.append)
    assert packed.report is not None
    return Case(root, out, packed.report, tuple(said), samples(out))


def test_what_is_left_out_and_why(case: Case) -> None:
    assert case.report.omitted == {
        "frames-4": "12 rows, but the video has 16 frames",
        "frames+3": "12 rows, but the video has 9 frames",
        "loop": "it has no folder of face crops",
        NOT_UTF8: "its name is not UTF-8: rename its files",
        "n" * 81: "its name is too long for a tar: rename it to at most 80 letters and digits",
    }
    assert "Units left out: 5" in case.said and any(line.split()[:1] == ["caf\\udce9"] for line in case.said)
    rows = [re.match(r"  \S+ +", line) for line in case.report.omission_lines()[1:]]
    assert {row.end() for row in rows if row} == {2 + 81 + 2} and len(rows) == 6  # one column, whatever the names
    for line in case.said:
        line.encode("utf-8")  # raises where a name's stray bytes are left in it, as a terminal would


def test_rows_and_frames_may_differ_by_minus_3_to_plus_2(case: Case) -> None:
    noted = case.details("rows differ from frames")
    assert {name: noted.get(name) for name in SPLITS if name not in case.report.omitted} == {
        name: (f"{d:+d}" if d else None) for name, d in SPLITS.items() if -3 <= d <= 2
    }


@pytest.mark.parametrize("fps", RATES)
def test_frame_rates_from_14_to_60(case: Case, fps: int) -> None:
    """The window of frame f ends at (f - 1) / fps seconds, whatever the rate."""
    name = f"9-{fps}-64x64"
    assert case.details("frame rate other than 30").get(name) == (None if fps == 30 else f"{fps:.2f} per second")
    pcm = np.concatenate([np.zeros(50_000, np.int16), made.sound(fps, 70 / fps)])
    for sample in case.of(name):
        p, audio = int(sample.id[2]), decode_audio(sample.audio, "wav")
        for n in (0, 5, (69 - p) // 4):
            end = 50_000 + round((p + 4 * n) / fps * 44_100)
            assert np.array_equal(audio[sample.ends[n] - 47_040 : sample.ends[n]], pcm[end - 47_040 : end])


@pytest.mark.parametrize("name", SOUNDS)
def test_mono_and_stereo_of_8_to_48_khz(case: Case, name: str) -> None:
    """A click at second 1 is heard 44,100 samples after the start, at full strength."""
    rate, channels = SOUNDS[name]
    assert case.details("sound of another rate")[name] == f"{rate} Hz"
    assert case.details("sound of several channels").get(name) == (None if channels == 1 else "2")
    sample = next(s for s in case.of(name) if int(s.id[2]) == 0)
    audio = decode_audio(sample.audio, "wav").astype(np.int64)
    loudest = int(np.abs(audio).argmax()) - int(sample.ends[0])  # sample 0's first window ends at second 0
    assert abs(loudest - 44_100) < 0.001 * 44_100 and np.abs(audio).max() > 8_000


def test_two_people_of_one_video_share_its_sound(case: Case) -> None:
    noted = case.details("several people in one video")
    assert noted == {
        name: f"2 units of {video}"
        for video, names in (("two", ("two_left", "two_right")), ("main", ("main", "main_right")), ("left", ("left", "left_left")))
        for name in names
    }
    videos = {u["name"]: u["video"] for u in json.loads((case.out / "manifest.json").read_text())["units"]}
    assert [videos[name] for name in ("two_left", "two_right", "main_right", "left_left")] == ["two", "two", "main", "left"]
    for names in (("two_left", "two_right"), ("main", "main_right"), ("left", "left_left")):
        one, other = (sorted(s.audio for s in case.of(name)) for name in names)
        assert one == other and any(decode_audio(sound, "wav").any() for sound in one)


def test_names_with_dots_spaces_and_letters_of_any_language(case: Case) -> None:
    escaped = {name: text for name, text in case.details("name escaped in keys").items() if not name.startswith("frames")}
    assert escaped == {"a.b": "a%2Eb", "a b": "a%20b", "größe": "gr%C3%B6%C3%9Fe"}
    for name in ("a.b", "a b", "größe"):
        assert len(case.of(name)) == 4 and all(s.present.sum() == 3 for s in case.of(name))


def test_links_are_followed_and_broken_ones_are_missing_files(case: Case) -> None:
    assert case.details("symbolic links") == {"linked": "linked.txt, linked"}
    assert all(sample.present.sum() == 3 for sample in case.of("linked"))
    assert case.details("frames without a crop")["dangling"] == "1 of 12" and "dangling" in case.details("no video file")


def test_of_doubles_the_first_is_taken(case: Case) -> None:
    assert "Train_Set/twice.txt" in case.details("duplicate labels")["twice"]
    assert "batch1/twice.avi" in case.details("duplicate videos")["twice"]
    assert len(case.of("twice")) == 4
    assert all(np.isfinite(s.va).all(axis=1).sum() == 3 for s in case.of("twice"))  # 12 rows, not 9


def test_crops_count_from_1_and_may_have_gaps(case: Case) -> None:
    assert case.details("frames without a crop")["gaps"] == "4 of 12" and case.details("frames without a crop")["zero"] == "1 of 12"
    assert case.details("crops outside the rows") == {"zero": "1"}
    present = np.zeros(13, int)
    for sample in case.of("gaps"):
        for k in np.flatnonzero(sample.present):
            present[1 + int(sample.id[2]) + 4 * (int(k) - 7)] = 1
    assert np.flatnonzero(present).tolist() == [2, 3, 4, 7, 8, 9, 10, 11]


def test_units_shorter_than_a_segment_are_told(case: Case) -> None:
    assert set(case.details("shorter than one segment")) >= {"gaps", "9-14-64x64"}


def test_every_kind_has_a_rule_and_a_line_in_both_reports(case: Case) -> None:
    kinds = {note.what for note in case.report.all_notes()}
    text, data = (case.out / "pack-report.txt").read_text(), json.loads((case.out / "pack-report.json").read_text())
    assert kinds <= set(RULES) and set(data["kinds"]) == kinds
    for what in kinds:
        assert re.search(rf"^  {re.escape(what)} +\d+ +{re.escape(RULES[what])}", text, re.MULTILINE), what
        assert data["rules"][what] == RULES[what]


def test_it_verifies_against_the_tree(case: Case) -> None:
    assert verify(VerifyOptions(shards=str(case.out), against=str(case.root), workers=1), quiet).defects == ()


def test_a_test_unit_with_an_impossible_name_stops_packing(tmp_path: Path) -> None:
    made.write_test_unit(tmp_path, "n" * 90, 12, 1)
    with pytest.raises(UserError, match=r"test unit n+ cannot be packed: its name is too long") as error:
        nameless(find_dataset(tmp_path).units)
    assert "Rename" in error.value.remedy
