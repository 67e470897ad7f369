"""Verification: a good folder has no defect, and every kind of damage is found and named."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jmt_dist.affwild2.layout import Unit
from jmt_dist.config import PackOptions, VerifyOptions
from jmt_dist.data.jpeg import Picture, black_entropy, parse
from jmt_dist.data.pack import pack
from jmt_dist.data.sample import Sample, encode_audio
from jmt_dist.data.strip import decode, join, join_coefficients, make_strip, split
from jmt_dist.data.tars import ShardWriter, index_text, parse_index, read_entry
from jmt_dist.data.verify import Defect, Verified, remedies, verify
from jmt_dist.data.verify_source import compare_sample

from .packing import contents
from .tree import jpeg, picture

ROOT = Path(__file__).parents[2]
FOLD = "folds/train+validation-0"


def check(shards: Path, against: str = "") -> Verified:
    return verify(VerifyOptions(shards=str(shards), against=against, workers=1), lambda line: None)


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "s")
    return tmp_path / "s"


def test_a_good_folder_has_no_defect(packed: Path, tree: Path) -> None:
    found = check(packed, str(tree))
    assert found.defects == () and found.samples == found.compared == 36
    assert verify(VerifyOptions(shards=str(packed), workers=2), lambda line: None) == Verified(36, 0, ())


def rewrite(shards: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], name: str = "00001") -> str:
    """Pack shard `name` anew with the members of one sample of a short labelled unit changed, index, manifest and folds in order.

    Returns that sample's key: only a look into the sample can find the defect.
    """
    tar, index = shards / f"{name}.tar", shards / f"{name}.idx"
    entries = parse_index(index.read_text())
    chosen_key = next(entry.key for entry in entries if not entry.key.startswith(("a1", "t8")))
    with tar.open("rb") as file:
        members = [read_entry(file, entry) for entry in entries]
    with ShardWriter(tar) as writer:
        for entry, data in zip(entries, members, strict=True):
            writer.add(entry.key, (change(data) if entry.key == chosen_key else data).items())
    lines = {entry.key: entry.line() for entry in writer.entries}
    for path in [index, *shards.glob(f"folds/**/{name}.idx")]:
        chosen = [entry.key for entry in parse_index(path.read_text())]
        path.write_text(f"v1.2 {len(chosen)}\n" + "".join(lines[text] + "\n" for text in chosen))
    manifest = json.loads((shards / "manifest.json").read_text())
    shard = next(s for s in manifest["shards"] if s["name"] == tar.name)
    shard["bytes"], shard["sha256"] = tar.stat().st_size, hashlib.sha256(tar.read_bytes()).hexdigest()
    (shards / "manifest.json").write_text(json.dumps(manifest))
    return chosen_key


def member(name: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda members: {**members, name: data(members[name]) if callable(data) else data}


def array(name: str, dtype: str, place: int, value: float) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def change(data: bytes) -> bytes:
        values = np.frombuffer(data, dtype).copy()
        values[place] = value
        return values.tobytes()

    return member(name, change)


SAMPLE_DAMAGE = {
    "strip cut": (member("strip.jpg", lambda d: d[: len(d) // 2]), "strip: truncated"),
    "strip of 70": (member("strip.jpg", lambda d: make_strip(list(split(d)[:70])).data), "strip of 70 frames"),
    "one picture": (member("strip.jpg", lambda d: split(d)[0]), "restart interval"),
    "audio cut": (member("audio.wav", lambda d: d[:-9_000]), "audio: not complete"),
    "audio rubbish": (member("audio.wav", b"RIFFrubbish"), "audio: cannot be decoded"),
    "audio short": (member("audio.wav", encode_audio(np.zeros(50_000, np.int16), "wav")), "outside [47040, 50000]"),
    "ends too early": (array("ends.i32", "<i4", 0, 47_039), "ends reach from 47039"),
    "ends go back": (array("ends.i32", "<i4", 5, 47_040), "ends go back"),
    "label range": (array("va.f32", "<f4", 0, 1.5), "outside [-1, 1]"),
    "label half": (array("va.f32", "<f4", 1, float("nan")), "only one of valence and arousal"),
    "label late": (array("va.f32", "<f4", slice(126, 128), 0.5), "past the end"),  # type: ignore[arg-type]
    "present value": (array("present.u8", "u1", 70, 2), "present is not 0 or 1"),
    "present outside": (array("present.u8", "u1", 0, 1), "outside the unit is marked present"),
    "absent, not black": (array("present.u8", "u1", 7, 0), "strip frame 7 is marked absent but not black"),
    "id": (array("id.i32", "<i4", 1, 3), "id ["),
    "mode": (array("id.i32", "<i4", 3, 3), "id ["),
    "member size": (member("ends.i32", b"1234"), "ends.i32 has 4 bytes"),
    "member gone": (lambda m: {k: v for k, v in m.items() if k != "va.f32"}, "instead of"),
    "member order": (lambda m: dict(sorted(m.items())), "not in their order"),
    "other audio": (lambda m: {("audio.flac" if k == "audio.wav" else k): v for k, v in m.items()}, "audio is flac, not wav"),
}


@pytest.mark.parametrize("what", SAMPLE_DAMAGE)
def test_damage_inside_a_sample_is_named_with_file_key_and_kind(shards: Path, what: str) -> None:
    change, message = SAMPLE_DAMAGE[what]
    key = rewrite(shards, lambda m: m)
    assert check(shards).defects == ()  # rewriting by itself is no damage
    rewrite(shards, change)
    defects = check(shards).defects
    assert defects and all((d.file, d.key) == ("00001.tar", key) for d in defects), defects
    assert any(message in d.what for d in defects), defects


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))


def cross(shards: Path) -> None:
    """A unit of fold-1's validation put into its training part too, in folds.json and indexes alike."""
    path = shards / FOLD / "folds.json"
    data = json.loads(path.read_text())
    del data["hash"]
    unit = data["folds"]["fold-1"]["validation"][0]
    data["folds"]["fold-1"]["train"].append(unit)
    path.write_text(json.dumps(data))


FILE_DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a bit of a strip": (lambda s: flip(s / "00002.tar", 5_000), "00002.tar", "sha256"),
    "tar cut": (lambda s: (s / "00003.tar").write_bytes((s / "00003.tar").read_bytes()[:700_000]), "00003.tar", "cannot be read"),
    "tar gone": (lambda s: (s / "00000.tar").unlink(), "00000.tar", "cannot be read"),
    "index of another": (lambda s: shutil.copy(s / "00000.idx", s / "00001.idx"), "00001.idx", "not the index of its tar"),
    "index gone": (lambda s: (s / "00004.idx").unlink(), "00004.idx", "cannot be read"),
    "stray tar": (lambda s: shutil.copy(s / "00000.tar", s / "00009.tar"), "00009.tar", "file of no shard"),
    "count": (lambda s: swap(s / "manifest.json", '"samples": 8', '"samples": 7'), "00000.tar", "7 in the manifest"),
    "rows": (lambda s: swap(s / "manifest.json", '"rows": 61', '"rows": 261'), "manifest.json", "sample is missing"),
    "unit": (lambda s: swap(s / "manifest.json", '"name": "d4"', '"name": "d5"'), "manifest.json", "of no unit"),
    "fold index gone": (lambda s: (s / FOLD / "fold-3/train/00001.idx").unlink(), f"{FOLD}/fold-3/train/00001.idx", "missing"),
    "fold index of all": (
        lambda s: shutil.copy(s / "00001.idx", s / FOLD / "official/train/00001.idx"),
        f"{FOLD}/official/train/00001.idx",
        "is not what folds.json",
    ),
    "stray fold index": (lambda s: (s / FOLD / "test/00077.idx").write_text("v1.2 0\n"), f"{FOLD}/test/00077.idx", "no shard"),
    "folds edited": (lambda s: swap(s / FOLD / "folds.json", '"a1"', '"a2"'), f"{FOLD}/folds.json", "was changed"),
    "video on both sides": (cross, f"{FOLD}/folds.json", "in training and validation"),
}


@pytest.mark.parametrize("what", FILE_DAMAGE)
def test_damage_to_files_is_named(shards: Path, what: str) -> None:
    damage, file, message = FILE_DAMAGE[what]
    damage(shards)
    defects = check(shards).defects
    assert any(d.file == file and message in d.what for d in defects), defects


def test_what_is_advised_mends_it(shards: Path, packed: Path, tree: Path) -> None:
    flip(shards / "00002.tar", 5_000)
    shutil.copy(shards / "00000.idx", shards / "00001.idx")
    shutil.copy(shards / "00000.tar", shards / "00009.tar")
    (shards / FOLD / "fold-3/train/00004.idx").unlink()
    defects = check(shards).defects
    assert {d.file for d in defects} == {"00002.tar", "00001.idx", "00009.tar", f"{FOLD}/fold-3/train/00004.idx"} | {
        d.file for d in defects if d.file.startswith(FOLD)
    }
    one, other = remedies(defects)
    assert one.startswith("Remove the tars and indexes named and run") and other.startswith(f"Remove the folder {FOLD} and run")
    for file in {d.file for d in defects if "/" not in d.file}:
        (shards / file).unlink()
    shutil.rmtree(shards / FOLD)
    pack(PackOptions(source=str(tree), out=str(shards), samples_per_shard=8, workers=1), lambda line: None)
    assert contents(shards) == contents(packed)
    assert remedies([]) == [] and "restore it" in remedies([Defect("manifest.json", "", "sample is missing")])[0]


def test_a_tar_that_is_gone_is_one_defect(shards: Path) -> None:
    (shards / "00002.tar").unlink()
    assert [defect.file for defect in check(shards).defects] == ["00002.tar"]  # and not each of its samples


def test_a_sample_that_is_there_twice(shards: Path) -> None:
    entries = parse_index((shards / "00001.idx").read_text())
    first = parse_index((shards / "00000.idx").read_text())[0]
    with (shards / "00000.tar").open("rb") as file:
        double = read_entry(file, first)
    with (shards / "00001.tar").open("rb") as file:
        members = [(e.key, read_entry(file, e)) for e in entries]
    with ShardWriter(shards / "00001.tar") as writer:
        for text, data in [(first.key, double), *members[1:]]:
            writer.add(text, data.items())
    (shards / "00001.idx").write_text(index_text(writer.entries))
    defects = check(shards).defects
    assert Defect("manifest.json", first.key, "sample is there 2 times") in defects
    assert Defect("manifest.json", entries[0].key, "sample is missing from the shards") in defects


def damage_source(root: Path, what: str) -> None:
    crops, labels = root / "cropped_aligned" / "d4", root / "annotations/VA_Estimation_Challenge/Train_Set/d4.txt"
    if what == "other picture":
        (crops / "00005.jpg").write_bytes(jpeg(picture(77)))
    elif what == "other quality":
        (crops / "00005.jpg").write_bytes(jpeg(picture(77), quality=60))
    elif what == "gone":
        (crops / "00005.jpg").unlink()
    elif what == "label":
        lines = labels.read_text().split("\n")
        lines[5] = "0.123,0.456"
        labels.write_text("\n".join(lines))


def test_units_and_rows_are_compared_with_the_source(packed: Path, tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    sample = next((root / "test_set_examples").iterdir())
    sample.write_text(sample.read_text() + "t8/00046.jpg,0,0\n")
    (root / "annotations/VA_Estimation_Challenge/Train_Set/new.txt").write_text("valence,arousal\n0,0\n")
    (root / "annotations/VA_Estimation_Challenge/Train_Set/a1.txt").unlink()
    found = {defect.what for defect in check(packed, str(root)).defects if defect.file == "manifest.json"}
    assert found == {
        f"unit t8 has 46 rows in {root}, not 45",
        f"unit new of {root} is neither packed nor in pack-report.json",
        f"unit a1 is not in {root}",
    }


AGAINST = {
    "other picture": "frame 5 (strip frame {k}): entropy-coded bytes differ",
    "other quality": "frame 5 (strip frame {k}): tables differ",
    "gone": "frame 5 (strip frame {k}) has no crop but is present",
    "label": "labels differ",
}


@pytest.mark.parametrize("what", AGAINST)
def test_against_its_source_a_difference_is_named(packed: Path, tree: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    damage_source(tmp_path / "tree", what)
    defects = check(packed, str(tmp_path / "tree")).defects
    assert [d.key for d in defects] == ["d4-0000-0"]  # frame 5 is of phase 0, and nowhere a lead-in
    assert AGAINST[what].format(k=8) in defects[0].what


def test_a_crop_that_was_black_although_its_source_is_good(shards: Path, tree: Path) -> None:
    def blacken(members: dict[str, bytes]) -> dict[str, bytes]:
        present = np.frombuffer(members["present.u8"], "u1").copy()
        frames = [data if there else None for data, there in zip(split(members["strip.jpg"]), present, strict=True)]
        place = int(np.flatnonzero(present)[0])
        frames[place], present[place] = None, 0
        return {**members, "strip.jpg": make_strip(frames).data, "present.u8": present.tobytes()}

    key = rewrite(shards, blacken)
    assert check(shards).defects == ()
    defects = check(shards, str(tree)).defects
    assert [d.key for d in defects] == [key] and "has a crop but is black" in defects[0].what


@pytest.mark.parametrize("mode", [1, 2])
def test_modes_1_and_2_against_their_sources(tree: Path, tmp_path: Path, mode: int) -> None:
    """A unit whose crops cannot be joined by markers: no defect as packed, and one when its source changes."""
    root, out = tmp_path / "tree", tmp_path / "s"
    shutil.copytree(tree, root)
    settings = {"optimize": True} if mode == 1 else {"progressive": True}
    for frame in range(1, 49):
        (root / "cropped_aligned" / "d4" / f"{frame:05d}.jpg").write_bytes(jpeg(picture(frame), **settings))
    pack(PackOptions(source=str(root), out=str(out), workers=1), lambda line: None)
    assert check(out, str(root)).defects == ()
    entries = parse_index((out / "00000.idx").read_text())
    with (out / "00000.tar").open("rb") as file:
        modes = {e.key[:2]: int(Sample.from_members(read_entry(file, e)).id[3]) for e in entries}
    assert modes["d4"] == mode and modes["a1"] == 0
    (root / "cropped_aligned" / "d4" / "00005.jpg").write_bytes(jpeg(picture(5000), **settings))
    defects = check(out, str(root)).defects
    assert [d.key for d in defects] == ["d4-0000-0"]
    assert ("decoded pixels differ" if mode == 1 else "dB from its sources") in defects[0].what


def test_mode_1_is_compared_by_coefficients_not_by_pixels_alone(tmp_path: Path) -> None:
    """Two blacks that decode alike: libjpeg's, and the one level lower that strips have for missing frames."""
    black = jpeg(Image.new("RGB", (112, 112)), optimize=True)
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "00001.jpg").write_bytes(black)
    unit = Unit("u", "u", "test", None, (tmp_path / "u",), None, 1)
    sources = [black if k == 7 else None for k in range(71)]  # strip frame 7 of phase 0 is source frame 1
    good = join_coefficients([None if source is None else parse(source)[0] for source in sources])
    ours = parse(black)[0].header.with_standard_codes()
    assert list(differences(good, unit)) == []
    other = join([None if k != 7 else Picture(ours, black_entropy(ours)) for k in range(71)])
    assert np.array_equal(np.asarray(decode(split(other)[7])), np.asarray(decode(split(good)[7])))
    assert list(differences(other, unit)) == ["frame 1 (strip frame 7): coefficients differ from the source's"]


def differences(strip: bytes, unit: Unit) -> Iterator[str]:
    present = np.array([k == 7 for k in range(71)], np.uint8)
    va, ends = np.full((64, 2), np.nan, np.float32), np.full(64, 47_040, np.int32)
    return compare_sample(Sample(strip, b"", "wav", ends, va, present, np.array([0, 0, 0, 1], np.int32)), unit, 1)


def test_the_program_exits_1_on_a_defect_and_ends_with_the_path(shards: Path) -> None:
    command = [sys.executable, str(ROOT / "shards" / "verify_shards.py"), f"shards={shards}", "workers=1"]
    good = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert good.returncode == 0 and good.stdout.splitlines()[-2:] == ["36 samples verified; 0 defects", str(shards)]
    flip(shards / "00002.tar", 5_000)
    bad = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert bad.returncode == 1 and "defect: 00002.tar: sha256" in bad.stdout
