"""The data and the watching of the benchmarks: what they measure must be what they say. Nothing is timed here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jmt_dist.affwild2.layout import find_dataset
from jmt_dist.affwild2.media import frame_timestamps, read_audio
from jmt_dist.errors import UserError

from .data.tree import jpeg, picture

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import bench_fusion
import common
import rehearse_full_scale as rehearsal
import scale_tree


def test_the_full_plan_has_the_counts_of_the_release() -> None:
    units = scale_tree.plan(1.0)
    counts = {split: (len(rows), sum(rows)) for split in scale_tree.SPLITS for rows in [[u.rows for u in units if u.split == split]]}
    assert counts == {"train": (356, 1_682_057), "validation": (76, 383_814), "test": (162, 927_210)}
    assert max(unit.rows for unit in units) == 47_435
    assert len({unit.name for unit in units}) == 594 > len({unit.video for unit in units})


def test_a_tree_of_links_reads_like_a_dataset(tmp_path: Path) -> None:
    source = tmp_path / "one.jpg"
    source.write_bytes(jpeg(picture(1)))
    units = [scale_tree.Planned("0000", "0000", "train", 70, 30), scale_tree.Planned("0001", "0001", "test", 50, 25)]
    scale_tree.write_tree(tmp_path / "tree", units, [[source]])
    found = {unit.name: unit for unit in find_dataset(tmp_path / "tree").units}
    assert {name: (unit.split, unit.rows) for name, unit in found.items()} == {"0000": ("train", 70), "0001": ("test", 50)}
    for unit, fps in ((found["0000"], 30), (found["0001"], 25)):
        assert unit.media is not None
        times, sound = frame_timestamps(unit.media), read_audio(unit.media)
        np.testing.assert_allclose(times, np.arange(unit.rows) / fps, atol=1e-3)
        assert sound is not None
        assert abs(len(sound) / 44_100 - unit.rows / fps) < 0.05
        assert sound.std() > 100
        assert sorted(path.name for path in unit.crops[0].iterdir())[-1] == f"{unit.rows:05d}.jpg"
    assert source.stat().st_nlink == 1 + 70 + 50


def test_the_scale_goes_down_for_the_disk_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    asked = rehearsal.Rehearsal(scale=1.0)
    assert rehearsal.fitting(asked, 500e9)[0] == 1.0
    scale, need = rehearsal.fitting(asked, 20e9)
    assert 0.1 < scale < 0.5
    assert need < 17e9
    assert "instead of 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="too little"):
        rehearsal.fitting(asked, 3.1e9)


def test_memory_that_is_taken_is_seen() -> None:
    with common.Memory(os.getpid(), interval=0.005) as before:
        while not before.own:
            pass
    with common.Memory(os.getpid(), interval=0.005) as memory:
        block = np.ones(25_000_000, np.float64)
        while memory.own < before.own + 190:  # 200 MB; the test's own time limit ends it where they are never seen
            pass
    assert block[-1] == 1
    assert memory.resident >= memory.own - 1


def test_flags_and_words() -> None:
    out = Path("/nowhere")
    assert common._flags(["json=true", "rounds=2"], out) == (["rounds=2"], "", out)
    assert common._flags(["json=rounds=2"], out) == (["rounds=2"], "", out)
    assert common._flags(["json=f.json", "out=/tmp"], out) == ([], "f.json", Path("/tmp"))
    assert common._flags(["rounds=2"], out) == (["rounds=2"], None, out)


def test_the_fusion_benchmark_compares_layers_of_the_same_number_and_models_of_the_same_parameters() -> None:
    sides = bench_fusion.sides(["jmt", "jmt-reference", "vanilla", "concat"])
    layers = {name: bench_fusion.attention_layers(model) for name, model in sides.items()}
    # the reference's head adds an encoder of the six outputs and an attention of the last one; its three modules serve six pairs
    one_by_one = {name: layers.pop(f"{name}/one-by-one") for name in ("jmt", "jmt-reference")}
    assert layers == {"transformer-encoder": 9, "jmt": 9, "jmt-reference": 9 + 6 + 1, "vanilla": 4, "concat": 0}
    assert one_by_one == {"jmt": 9, "jmt-reference": 16}
    audio, visual = torch.randn(2, 8, 512), torch.randn(2, 8, 512)
    with torch.no_grad():
        for name in ("jmt", "jmt-reference"):
            difference = sides[name](audio, visual) - sides[f"{name}/one-by-one"](audio, visual)
            assert difference.abs().max() < 1e-4 * max(1.0, float(sides[name](audio, visual).abs().max()))
    # multiply-adds of the yardstick by hand: 6 matrices of 512² a layer and position, 2 products of 512 a pair of positions, of which
    # the inputs' gradients are as many and the weights' too, but that the first layer's inputs need none for its three projections
    forward, pairs = 9 * 8 * 6 * 512**2, 9 * 8 * 8 * 2 * 512
    once = 2 * (3 * forward - 3 * 8 * 512**2 + 3 * pairs)
    step = bench_fusion.step_of(sides["transformer-encoder"], audio[:1], visual[:1])
    assert bench_fusion.gflop(step) == pytest.approx(once / 1e9, rel=1e-6)
    found = bench_fusion.case(sides, 1, 64, bench_fusion.FusionBenchOptions(rounds=1, seconds=1e-6))
    assert set(found) == set(sides) and found["transformer-encoder"]["ratio_per_attention_layer"] == 1
    assert found["transformer-encoder"]["ratio_per_operation"] == 1 and found["jmt-reference"]["gflop"] > found["jmt"]["gflop"]
