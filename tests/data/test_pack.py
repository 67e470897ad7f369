"""Packing a tree whose every pixel, label and sound is known; interruptions, refusals, irregular input."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jmt_dist.affwild2 import media as media_module
from jmt_dist.affwild2.fixture import make_fixture
from jmt_dist.affwild2.release import RELEASES, Counts
from jmt_dist.config import FixtureOptions, FoldOptions, PackOptions, VerifyOptions
from jmt_dist.data import pack as pack_module
from jmt_dist.data import pack_shard as shard_module
from jmt_dist.data import pack_steps as steps_module
from jmt_dist.data.pack import pack
from jmt_dist.data.pack_shard import global_order
from jmt_dist.data.sample import Sample, decode_audio, parse_key
from jmt_dist.data.shards import open_shards
from jmt_dist.data.tars import parse_index, read_entry
from jmt_dist.data.verify import verify
from jmt_dist.errors import UserError

from . import tree as made

ROOT = Path(__file__).parents[2]
ROWS = {"a1": 300, "b.2": 40, "video3": 61, "d4": 48, "e5": 33, "t8": 45, "v6": 50, "v7": 35}
SEEDS = {"a1": 1, "b.2": 2, "video3": 3, "d4": 4, "e5": 5, "v6": 6, "v7": 7, "t8": 8}
RATES = {"b.2": 25, "e5": 15}


def options(tree: Path, out: Path, **changes: Any) -> PackOptions:
    return PackOptions.model_validate({"source": str(tree), "out": str(out), "samples_per_shard": 8, "workers": 1, **changes})


def quiet(line: str) -> None:
    del line


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file by its path."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def ages(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def samples(shards: Path) -> dict[str, Sample]:
    found = {}
    for index in sorted(shards.glob("*.idx")):
        with index.with_suffix(".tar").open("rb") as file:
            for entry in parse_index(index.read_text()):
                found[entry.key] = Sample.from_members(read_entry(file, entry))
    return found


def test_every_sample_holds_what_the_tree_has(packed: Path, tree: Path) -> None:
    """Frames against the source files, labels and sound against the arrays they were made from."""
    found = samples(packed)
    manifest = json.loads((packed / "manifest.json").read_text())
    names = [unit["name"] for unit in manifest["units"]]
    assert names == sorted(ROWS) and len(found) == 8 * 4 + 4
    for text, sample in found.items():
        unit, m, p = parse_key(text)
        assert sample.id.tolist() == [names.index(unit), m, p, 0]
        rows, fps = ROWS[unit], RATES.get(unit, 30)
        frames = [256 * m + 1 + p + 4 * (k - 7) for k in range(71)]
        assert sample.present.tolist() == [int(1 <= frame <= rows) for frame in frames]
        strip = np.asarray(Image.open(io.BytesIO(sample.strip))).reshape(71, 112, 112, 3)
        for k, frame in enumerate(frames):
            wanted = np.zeros((112, 112, 3), np.uint8)
            if 1 <= frame <= rows:
                wanted = np.asarray(Image.open(tree / "cropped_aligned" / unit / f"{frame:05d}.jpg"))
            assert np.array_equal(strip[k, 1:111], wanted[1:111]), (text, k)
        labels = made.labels(rows, SEEDS[unit]) if unit != "t8" else np.full((rows, 2), np.nan, np.float32)
        pcm = np.concatenate([np.zeros(50_000, np.int16), made.sound(SEEDS[unit], rows / fps), np.zeros(900_000, np.int16)])
        audio = decode_audio(sample.audio, "wav")
        for n, frame in enumerate(frames[7:]):
            assert np.array_equal(sample.va[n], labels[frame - 1] if frame <= rows else [np.nan, np.nan], equal_nan=True)
            end = 50_000 + round((frame - 1) / fps * 44_100)
            assert np.array_equal(audio[sample.ends[n] - 47_040 : sample.ends[n]], pcm[end - 47_040 : end]), (text, n)


def test_output_does_not_depend_on_the_number_of_workers(packed: Path, tree: Path, tmp_path: Path) -> None:
    pack(options(tree, tmp_path / "s", workers=2), quiet)
    assert contents(tmp_path / "s") == contents(packed)
    assert not (tmp_path / "s" / ".work").exists()


def test_packing_keeps_no_sound_mapped(packed: Path, tree: Path, tmp_path: Path) -> None:
    """A worker passes over the sound of the whole dataset: mappings that it keeps would count as its memory."""
    pack(options(tree, tmp_path / "s", workers=1), quiet)
    assert contents(tmp_path / "s") == contents(packed)
    assert "pcm.npy" not in Path("/proc/self/maps").read_text()


def test_no_sample_costs_a_pass_over_its_unit(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The median interval takes all of a video's timestamps: once for each video, not for each of its samples."""
    calls: list[int] = []
    real = shard_module.median_interval
    monkeypatch.setattr(shard_module, "median_interval", lambda times: [calls.append(len(times)), real(times)][1])
    monkeypatch.setattr(media_module, "median_interval", lambda times: pytest.fail("asked for a sample"))
    pack(options(tree, tmp_path / "s", samples_per_shard=64), quiet)
    assert sorted(calls) == sorted(ROWS.values())


def test_a_second_run_does_nothing(tree: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s"
    shutil.copytree(packed, out)
    before, old = contents(out), ages(out)
    monkeypatch.setattr(pack_module, "find_dataset", lambda root: pytest.fail("the dataset was read again"))
    said: list[str] = []
    pack(options(tree, out), said.append)
    assert contents(out) == before and ages(out) == old and "packed already" in said[0]


def test_an_interrupted_run_goes_on(packed: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s"
    real, made_shards = steps_module.pack_shard, []

    def interrupted(task: Any) -> Any:
        if len(made_shards) == 2:
            (out / ".work" / task.name).write_bytes(b"half a tar")
            raise KeyboardInterrupt
        made_shards.append(task.name)
        return real(task)

    monkeypatch.setattr(steps_module, "pack_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(options(tree, out), quiet)
    assert sorted(p.name for p in out.glob("*.tar")) == ["00000.tar", "00001.tar"] and not (out / "manifest.json").exists()
    old = ages(out)
    monkeypatch.setattr(steps_module, "pack_shard", real)
    with pytest.raises(UserError, match="half packed"):
        pack(options(tree, out, audio="flac"), quiet)
    pack(options(tree, out), quiet)
    assert contents(out) == contents(packed)
    assert {name: ages(out)[name] for name in old} == old


def test_a_lost_or_cut_shard_is_made_again_alike(packed: Path, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    shutil.copytree(packed, out)
    (out / "00001.tar").unlink()
    os.truncate(out / "00003.tar", 5_000)
    (out / "00002.idx").unlink()
    kept = {name: age for name, age in ages(out).items() if name in ("00000.tar", "00004.tar")}
    pack(options(tree, out), quiet)
    assert contents(out) == contents(packed)
    assert {name: ages(out)[name] for name in kept} == kept


def test_another_fold_policy_adds_indexes_only(packed: Path, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    shutil.copytree(packed, out)
    before, old = contents(out), ages(out)
    pack(options(tree, out, folds=FoldOptions(policy="train-only", seed=3)), quiet)
    after = contents(out)
    assert {name: after[name] for name in before} == before and ages(out) == old
    added = {name.split("/")[1] for name in after.keys() - before.keys()}
    assert added == {"train-only-3"} and "folds/train-only-3/fold-1/train/00000.idx" in after


def test_flac_shards_hold_the_same_sound(packed: Path, tree: Path, tmp_path: Path) -> None:
    pack(options(tree, tmp_path / "s", audio="flac"), quiet)
    wav, flac = samples(packed), samples(tmp_path / "s")
    assert wav.keys() == flac.keys()
    for text, sample in flac.items():
        assert sample.kind == "flac" and np.array_equal(decode_audio(sample.audio, "flac"), decode_audio(wav[text].audio, "wav"))


def test_order_is_random_global_and_of_the_seed() -> None:
    units = [(f"unit{k}", 2_000) for k in range(50)]
    one, same, other = global_order(units, 0), global_order(units, 0), global_order(units, 1)
    assert one == same != other and sorted(one) == sorted(other) == [(i, m, p) for i in range(50) for m in range(8) for p in range(4)]
    places = np.array([sample[0] for sample in one])
    assert abs(np.corrcoef(np.arange(len(places)), places)[0, 1]) < 0.1
    without = [sample for sample in global_order([*units[:-1], ("unit49", 0)], 0)]
    assert without == [sample for sample in one if sample[0] != 49]  # a unit that goes moves no other


Break = Callable[[Path, Path, pytest.MonkeyPatch], dict[str, Any]]


def _foreign(tree: Path, out: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.doc").write_text("")
    return {}


def _no_space(tree: Path, out: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    shutil.rmtree(out)
    patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1_000_000))  # type: ignore[attr-defined]
    return {}


def _no_dataset(tree: Path, out: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    shutil.rmtree(out)
    return {"source": "/nowhere"}


def _other_source(tree: Path, out: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"source": str(tree.parent)}


REFUSED: dict[str, tuple[Break, str]] = {
    "other audio": (lambda t, o, p: {"audio": "flac"}, "was packed with audio=wav, not audio=flac"),
    "other seed": (lambda t, o, p: {"seed": 1}, "was packed with seed=0"),
    "other size": (lambda t, o, p: {"samples_per_shard": 9}, "samples_per_shard=8"),
    "other source": (_other_source, "was packed from"),
    "foreign folder": (_foreign, "holds files that are not shards"),
    "no space": (_no_space, "GB free"),
    "no dataset": (_no_dataset, "no folder /nowhere"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str, packed: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s"
    shutil.copytree(packed, out)
    change, message = REFUSED[what]
    changes = change(tree, out, monkeypatch)
    before = contents(out) if out.exists() else None
    with pytest.raises(UserError, match=message) as error:
        pack(options(tree, out, **changes), quiet)
    assert error.value.remedy and "\n" not in str(error.value)
    assert (contents(out) if out.exists() else None) == before


def test_two_packings_of_one_folder_are_refused(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="being packed by another process"):
        pack(options(tree, out), quiet)
    os.close(handle)


def test_a_dry_run_writes_nothing_and_says_what_it_would_take(tree: Path, tmp_path: Path) -> None:
    said: list[str] = []
    packed = pack(options(tree, tmp_path / "s", dry=True), said.append)
    assert packed.manifest is None and not (tmp_path / "s").exists()
    assert any("36 samples; about" in line and "GB of shards" in line for line in said)


def test_the_estimate_of_space_is_near_what_packing_takes(tmp_path: Path) -> None:
    from jmt_dist.affwild2.layout import find_dataset
    from jmt_dist.data.estimate import estimate

    for k in range(5):
        made.write_unit(tmp_path / "tree", f"u{k}", 256, k + 1)
    for audio in ("wav", "flac"):
        expected = estimate(find_dataset(tmp_path / "tree").units, audio, 1)  # type: ignore[arg-type]
        pack(options(tmp_path / "tree", tmp_path / audio, audio=audio), quiet)
        real = sum(path.stat().st_size for path in (tmp_path / audio).glob("*.tar"))
        assert expected.samples == 20 and 0.95 < expected.bytes / real < 1.3  # FLAC: the silence around a short unit is nearly free
        assert abs(expected.work - 5 * 2 * 256 / 30 * 44_100) < 100 and expected.seconds > 0


def test_units_that_cannot_be_packed_are_left_out_and_test_units_never(tree: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "tree", tmp_path / "s"
    shutil.copytree(tree, root)
    shutil.rmtree(root / "cropped_aligned" / "d4")
    shutil.rmtree(root / "cropped_aligned" / "t8")
    (root / "batch1" / "t8.avi").write_bytes(b"rubbish")
    made.write_unit(root, "long", 60, 9)
    made.write_video(root / "batch1" / "long.avi", 50, 30, made.sound(9, 2))
    bad = root / made.LABELS / "Train_Set" / "e5.txt"
    bad.write_text(bad.read_text().replace("\n0", "\nzero", 1))
    report = pack(options(root, out), quiet).report
    assert report is not None
    assert report.omitted["d4"] == "it has no folder of face crops"
    assert report.omitted["long"] == "60 rows, but the video has 50 frames"
    assert "e5.txt is not `valence,arousal`" in report.omitted["e5"] and len(report.omitted) == 3
    found = {text: s for text, s in samples(out).items() if text.startswith("t8")}
    assert len(found) == 4 and not any(s.present.any() or decode_audio(s.audio, "wav").any() for s in found.values())
    text = (out / "pack-report.txt").read_text()
    assert "Units left out: 3" in text and re.search(r"test unit kept in spite of an error +1 ", text)
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


def test_too_few_videos_for_folds_is_an_error_before_pass_two(tmp_path: Path) -> None:
    for k in range(3):
        made.write_unit(tmp_path / "tree", f"u{k}", 20, k + 1)
    with pytest.raises(UserError, match="3 videos cannot be divided"):
        pack(options(tmp_path / "tree", tmp_path / "s"), quiet)
    assert not list((tmp_path / "s").glob("*.tar"))


@pytest.fixture(scope="session")
def irregular(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture with every irregularity of the real dataset, one tiny unit each."""
    out = tmp_path_factory.mktemp("irregular") / "fixture"
    make_fixture(FixtureOptions(out=str(out), units=3, test_units=1, rows=64, gotchas="all", workers=2))
    return out


def test_every_irregularity_of_the_dataset(irregular: Path, tmp_path: Path) -> None:
    """What each costs is decided by rule: the expectations name gotchas, as fixture.json does."""
    out = tmp_path / "s"
    told = json.loads((irregular / "fixture.json").read_text())
    gotchas = {name: unit["gotcha"] for name, unit in _units(told).items() if unit.get("gotcha")}
    packed = pack(options(irregular, out, samples_per_shard=64, workers=2), quiet)
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
    assert not verify(VerifyOptions(shards=str(out), against=str(irregular), workers=1), quiet).defects


def _units(told: Any) -> dict[str, dict[str, Any]]:
    """Units of fixture.json by name, wherever it keeps them."""
    units = told["units"]
    return units if isinstance(units, dict) else {unit["name"]: unit for unit in units}


def program(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "shards" / "pack_shards.py", *words], capture_output=True, text=True, timeout=120)


def test_the_program_says_what_it_did_and_ends_with_the_path(tree: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "tree", tmp_path / "s"
    shutil.copytree(tree, root)
    shutil.rmtree(root / "cropped_aligned" / "d4")
    for _ in range(2):  # the second run finds all done, and still tells of the omission
        done = program(f"source={root}", f"out={out}", "workers=1")
        assert done.returncode == 3 and done.stdout.splitlines()[-1] == str(out)
        assert "  d4    it has no folder of face crops" in done.stdout
    assert len(open_shards(out).units) == 7
    wrong = program("source=x", "out=y", "worker=2")
    assert wrong.returncode == 2 and "Did you mean `workers`?" in wrong.stderr
    missing = program(f"source={tmp_path / 'nothing'}", f"out={out}2")
    assert missing.returncode == 1 and len(missing.stderr.splitlines()) == 1
