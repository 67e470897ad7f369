"""Irregular input: what it costs, and that the report tells of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmt_dist.affwild2.fixture import FixtureReport
from jmt_dist.affwild2.release import RELEASES, Counts
from jmt_dist.config import VerifyOptions
from jmt_dist.data.pack import pack
from jmt_dist.data.sample import decode_audio, parse_key
from jmt_dist.data.shards import open_shards
from jmt_dist.data.verify import verify
from jmt_dist.errors import UserError

from . import tree as made
from .packing import options, quiet, samples


def test_units_that_cannot_be_packed_are_left_out_and_test_units_never(tree: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "tree", tmp_path / "s"
    shutil.copytree(tree, root)
    shutil.rmtree(root / "cropped_aligned" / "d4")
    shutil.rmtree(root / "cropped_aligned" / "t8")
    (root / "batch1" / "t8.avi").write_bytes(b"rubbish")
    made.write_unit(root, "long", 60, 9)
    made.write_unit(root, "empty", 12, 10, crops=False)
    (root / "cropped_aligned" / "empty").mkdir()
    (root / "cropped_aligned" / "empty" / "00013.jpg").write_bytes(b"")  # past the end
    made.write_video(root / "batch1" / "long.avi", 50, 30, made.sound(9, 2))
    bad = root / made.LABELS / "Train_Set" / "e5.txt"
    bad.write_text(bad.read_text().replace("\n0", "\nzero", 1))
    report = pack(options(root, out), quiet).report
    assert report is not None
    assert report.omitted["d4"] == "it has no folder of face crops"
    assert report.omitted["long"] == "60 rows, but the video has 50 frames"
    assert report.omitted["empty"] == "its folder of face crops holds none of its frames"
    assert "e5.txt is not `valence,arousal`" in report.omitted["e5"] and len(report.omitted) == 4
    found = {text: s for text, s in samples(out).items() if text.startswith("t8")}
    assert len(found) == 4 and not any(s.present.any() or decode_audio(s.audio, "wav").any() for s in found.values())
    text = (out / "pack-report.txt").read_text()
    assert "Units left out: 4" in text and re.search(r"test unit kept in spite of an error +1 ", text)
    with pytest.raises(UserError, match=r"t8\.avi cannot be read"):
        pack(options(root, tmp_path / "strict", strict=True), quiet)
    shutil.copy(tree / "batch1" / "t8.avi", root / "batch1" / "t8.avi")
    with pytest.raises(UserError, match="unit d4 cannot be packed"):
        pack(options(root, tmp_path / "strict", strict=True), quiet)


def test_a_release_is_named_only_if_units_rows_and_rows_marked_5_are_its_own(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real counts need real files, so a release with this tree's counts is put beside the real one."""
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    bad = root / made.LABELS / "Train_Set" / "a1.txt"
    lines = bad.read_text().splitlines()
    bad.write_text("\n".join([*lines[:50], "-5,-5", "-5.0,-5", *lines[52:]]) + "\n")
    units, rows = {"train": 5, "validation": 2, "test": 1}, {"train": 482, "validation": 85, "test": 45}
    for marked, release in ((2, "tiny"), (3, "unknown (units and rows of tiny, but rows marked -5: 2 instead of 3 in train)")):
        known = {"train": marked, "validation": 0, "test": None}
        monkeypatch.setitem(RELEASES, "tiny", {split: Counts(units[split], rows[split], known[split]) for split in units})
        out = tmp_path / f"s{marked}"
        packed = pack(options(root, out), quiet)
        assert packed.manifest is not None and packed.manifest.release == release == open_shards(out).release
        assert (out / "pack-report.txt").read_text().startswith(f"Packed release {release} from ")
        assert json.loads((out / "pack-report.json").read_text())["counts"]["train"] == {
            "units": 5, "rows": 482, "labelled rows": 480, "rows -5": 2, "samples": 24
        }  # fmt: skip


def test_unreadable_crops_are_black_and_reported(tree: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "tree", tmp_path / "s"
    shutil.copytree(tree, root)
    crops = root / "cropped_aligned" / "d4"
    (crops / "00005.jpg").write_bytes(b"")
    (crops / "00006.jpg").write_bytes((crops / "00007.jpg").read_bytes()[:999])
    (crops / "00009.jpg").unlink()
    (crops / "00099.jpg").write_bytes(b"")  # past the end: never asked for
    packed = pack(options(root, out), quiet)
    assert packed.report is not None and packed.report.unreadable == [("d4", 5), ("d4", 6)]
    mine = [sample for text, sample in samples(out).items() if text.startswith("d4-")]
    absent = {256 * int(s.id[1]) + 1 + int(s.id[2]) + 4 * (int(k) - 7) for s in mine for k in np.flatnonzero(s.present == 0)}
    assert {frame for frame in absent if 1 <= frame <= 48} == {5, 6, 9}
    notes = {(note.unit, note.what): note.detail for note in packed.report.all_notes()}
    assert notes["d4", "unreadable crops"] == "5, 6" and notes["d4", "crops outside the rows"] == "1"


def test_every_irregularity_of_the_dataset(irregular: FixtureReport, tmp_path: Path) -> None:
    """What each costs is decided by rule: the expectations name gotchas, as fixture.json does."""
    out = tmp_path / "s"
    told = json.loads((irregular.out / "fixture.json").read_text())
    gotchas = {name: unit["gotcha"] for name, unit in _units(told).items() if unit.get("gotcha")}
    packed = pack(options(irregular.out, out, samples_per_shard=64, workers=2), quiet)
    assert packed.report is not None and packed.manifest is not None
    assert {gotchas[name] for name in packed.report.omitted} == {
        "no-crops", "rows-plus-6", "rows-minus-5", "label-broken", "name-not-utf8",
    }  # fmt: skip
    modes: dict[str, set[int]] = {}
    for text, sample in samples(out).items():
        modes.setdefault(gotchas.get(parse_key(text)[0], ""), set()).add(int(sample.id[3]))
    assert {name for name, found in modes.items() if 1 in found} == {"jpeg-optimised"}
    reencoded = {"jpeg-wrong-size", "jpeg-grayscale", "jpeg-progressive", "jpeg-quality"}
    assert {name for name, found in modes.items() if 2 in found} == reencoded
    assert modes["jpeg-corrupt"] == {0} and modes["jpeg-444"] == {0}
    noted = {(gotchas.get(note.unit, ""), note.what) for note in packed.report.all_notes()}
    for pair in [
        ("rows-plus-1", "rows differ from frames"),
        ("invalid-rows", "rows marked -5"),
        ("no-audio", "no audio stream"),
        ("audio-empty", "empty audio stream"),
        ("no-media", "no video file"),
        ("unreadable-media", "unreadable video file"),
        ("test-unreadable", "unreadable video file"),
        ("label-nan", "rows that say NaN"),
        ("label-out-of-range", "rows outside [-1, 1]"),
        ("jpeg-corrupt", "unreadable crops"),
        ("missing-crops", "frames without a crop"),
        ("split-folder", "several crop folders"),
        ("variable-rate", "variable frame rate"),
        ("rows-plus-2", "rows differ from frames"),
        ("rows-minus-1", "rows differ from frames"),
        ("rows-plus-1", "sound of several channels"),
        ("rows-plus-1", "sound of another rate"),
        ("rows-minus-1", "frame rate other than 30"),
        ("short", "shorter than one segment"),
        ("jpeg-wrong-size", "crops of another size"),
        ("jpeg-grayscale", "grayscale crops"),
        ("jpeg-progressive", "progressive crops"),
        ("jpeg-444", "crops without 4:2:0 sampling"),
        ("jpeg-optimised", "crops with Huffman tables of their own"),
        ("jpeg-quality", "crops of other quantisation"),
        ("label-no-header", "label file without a header"),
        ("label-crlf", "label file with CRLF"),
        ("audio-late", "sound offset"),
        ("audio-early", "sound offset"),
        ("audio-short", "sound shorter than the video"),
        ("name-with-dot", "name escaped in keys"),
        ("name-with-space", "name escaped in keys"),
        ("symbolic-link", "symbolic links"),
        ("new-folder", "crops in a further folder"),
        ("duplicate", "duplicate labels"),
        ("duplicate", "duplicate videos"),
        ("main-and-left", "several people in one video"),
    ]:
        assert pair in noted, pair
    quiet_ones = (
        {gotcha for gotcha in gotchas.values()}
        - {gotcha for gotcha, what in noted if what != "shorter than one segment"}
        - {gotchas[n] for n in packed.report.omitted}
    )
    assert quiet_ones == set()  # no irregular unit without a line
    assert not verify(VerifyOptions(shards=str(out), against=str(irregular.out), workers=1), quiet).defects


def _units(told: Any) -> dict[str, dict[str, Any]]:
    """Units of fixture.json by name, wherever it keeps them."""
    units = told["units"]
    return units if isinstance(units, dict) else {unit["name"]: unit for unit in units}
