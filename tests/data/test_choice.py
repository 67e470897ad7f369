"""Which samples, passes and labels a recipe trains on: phases, offsets per epoch, label position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jmt_dist.config import DataOptions
from jmt_dist.data.features import FeatureSet
from jmt_dist.data.passes import Passes
from jmt_dist.data.pipeline import ClipLoader
from jmt_dist.data.redivide import write_phases
from jmt_dist.data.shards import ShardSet
from jmt_dist.errors import UserError
from jmt_dist.evaluate.predict import UnitRows, dense

from .tiny import numbered, write_tiny

DATA = DataOptions(threads=1, shuffle_buffer=8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_tiny(tmp_path_factory.mktemp("choice") / "shards", [6, 1, 4])


def loader(shards: ShardSet, **options: Any) -> ClipLoader:
    return ClipLoader(shards, **{"data": DATA, "batch": 4, "streams": (), "seed": 5, **options})


def shifted(unit: int, n: int) -> float:
    """The label that `tiny_sample` gives strip frame 7 + n, three frames before: none before the first clip end."""
    return unit + (n - 3) / 1000 if n >= 3 else float("nan")


def test_the_middle_label_is_that_of_the_frame_12_source_frames_before_the_end(shards: ShardSet) -> None:
    batches = list(loader(shards, label="middle").batches())
    ends = list(loader(shards).batches())
    assert len(batches) == 3
    for batch, end in zip(batches, ends, strict=True):
        assert torch.equal(batch["id"], end["id"]) and torch.equal(batch["q"], end["q"])  # the label moves nothing else
        for row, (unit, q) in enumerate(zip(batch["id"][:, 0].tolist(), batch["q"].tolist(), strict=True)):
            wanted = [shifted(unit, q + 8 * j) for j in range(8)]
            np.testing.assert_allclose(batch["va"][row, :, 0], wanted, atol=1e-6)
            np.testing.assert_allclose(end["va"][row, :, 0], [unit + (q + 8 * j) / 1000 for j in range(8)], atol=1e-6)
    for batch in loader(shards, label="middle", offsets=[0, 5]).batches():
        for row, unit in enumerate(batch["id"][:, 0].tolist()):
            wanted = [[shifted(unit, q + 8 * j) for j in range(8)] for q in (0, 5)]
            np.testing.assert_allclose(batch["va"][row, :, :, 0], wanted, atol=1e-6)
            np.testing.assert_allclose(batch["labels"][row, :, 0], unit + np.arange(64) / 1000, atol=1e-6)


def features() -> FeatureSet:
    ident = np.array([[*row, 0] for row in numbered(11)], "<i4")
    labels = np.stack([ident[:, :1] + np.arange(64) / 1000] * 2, axis=2).astype("<f4")
    values = np.broadcast_to(np.arange(11, dtype="<f2")[:, None, None, None], (11, 8, 8, 512))
    return FeatureSet(values, values, labels, ident, tuple(range(8)), back=3)


def test_features_take_the_same_labels_and_phases() -> None:
    made = features()
    wanted = [[[shifted(unit, q + 8 * j) for j in range(8)] for q in range(8)] for unit in made.ident[:, 0].tolist()]
    np.testing.assert_allclose(made.va()[..., 0], wanted, atol=1e-6)
    chosen = made.of_phases([1, 3])
    assert [tuple(row[:3]) for row in chosen.ident.tolist()] == [ident for ident in numbered(11) if ident[2] in (1, 3)]
    visual, _ = chosen.take(np.arange(len(chosen.ident)), np.zeros(len(chosen.ident), np.int64))
    assert visual[:, 0, 0].tolist() == [k for k in range(11) if k % 4 in (1, 3)]
    with pytest.raises(UserError, match="no sample is of phases"):
        chosen.of_phases([0])


def test_phases_leave_out_the_other_samples_and_nothing_else(shards: ShardSet, tmp_path: Path) -> None:
    chosen = write_phases(shards, [0, 2], tmp_path)
    wanted = sorted(ident for ident in numbered(11) if ident[2] in (0, 2))
    seen = [tuple(row[:3]) for batch in loader(chosen, offsets=[0]).batches() for row in batch["id"].tolist()]
    assert sorted(seen) == wanted and chosen.samples == len(wanted)
    with pytest.raises(UserError, match="no sample is of phases"):
        write_phases(chosen, [1], tmp_path / "none")


def test_offsets_per_epoch_are_passes_over_all_samples_that_can_be_interrupted(shards: ShardSet) -> None:
    whole = Passes(loader(shards), 3)
    epochs = [[(batch["id"], batch["q"]) for batch in whole.batches(epoch)] for epoch in range(2)]
    assert [len(epoch) for epoch in epochs] == [whole.steps] * 2 == [9, 9]
    for epoch in epochs:
        for first in (0, 3, 6):
            assert {tuple(row[:3]) for ids, _ in epoch[first : first + 3] for row in ids.tolist()} == set(numbered(11))
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(epochs[0][:3], epochs[0][3:6], strict=True))
    for done in (2, 3, 5, 9):  # within a pass, between two, at the end
        begun = Passes(loader(shards), 3)
        source = begun.batches(0)
        for _ in range(done):
            next(source)
        resumed = Passes(loader(shards), 3)
        resumed.restore(begun.state())
        rest = [(batch["id"], batch["q"]) for batch in resumed.batches(0, done)] + [(b["id"], b["q"]) for b in resumed.batches(1)]
        for found, wanted in zip(rest, [*epochs[0][done:], *epochs[1]], strict=True):
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_predictions_belong_to_the_frame_whose_label_was_learned() -> None:
    """A model that says the end frame of each clip: with middle labels, frame f is told by the clip that ends at f + 12."""
    rows = 300
    ids = [(0, m, p, 0) for m in range(2) for p in range(4)]
    ends = np.array([[[256 * m + 1 + p + 4 * (q + 8 * j) for j in range(8)] for q in range(8)] for _, m, p, _ in ids], np.float32)
    va = np.stack([ends, ends], axis=-1)
    frames = np.arange(1, rows + 1)
    at_end = dense(va, ids, range(8), [UnitRows(0, "u", rows)])["u"][:, 0]
    np.testing.assert_array_equal(at_end, frames)
    middle = dense(va, ids, range(8), [UnitRows(0, "u", rows)], "middle")["u"][:, 0]
    np.testing.assert_array_equal(middle, frames + 12)
