"""Packing a tree whose every pixel, label and sound is known; its bytes do not depend on how; interruptions."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jmt_dist.affwild2 import media as media_module
from jmt_dist.config import FoldOptions
from jmt_dist.data import pack as pack_module
from jmt_dist.data import pack_shard as shard_module
from jmt_dist.data import pack_steps as steps_module
from jmt_dist.data.pack import pack
from jmt_dist.data.pack_shard import global_order
from jmt_dist.data.sample import decode_audio, parse_key
from jmt_dist.data.shards import open_shards
from jmt_dist.errors import UserError

from . import tree as made
from .packing import ages, contents, options, quiet, samples

ROOT = Path(__file__).parents[2]
ROWS = {"a1": 300, "b.2": 40, "video3": 61, "d4": 48, "e5": 33, "t8": 45, "v6": 50, "v7": 35}
SEEDS = {"a1": 1, "b.2": 2, "video3": 3, "d4": 4, "e5": 5, "v6": 6, "v7": 7, "t8": 8}
RATES = {"b.2": 25, "e5": 15}


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


def test_a_shard_of_many_units_needs_no_descriptor_for_each(packed: Path, tree: Path, tmp_path: Path) -> None:
    """Of 1,024, the usual limit, three for each unit were too few from 340 samples per shard on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    left = [number for number in range(len(used) + 15) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (left[14], hard))  # fourteen more files may be open; three for each unit are 24
    try:
        pack(options(tree, tmp_path / "s", samples_per_shard=64), quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert samples(tmp_path / "s").keys() == samples(packed).keys()


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
