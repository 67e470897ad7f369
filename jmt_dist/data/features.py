"""Features of the frozen backbones: stored as WebDataset shards, read back as arrays, divided into batches (DESIGN section 6).

Members of a sample: visual.f16 and audio.f16 [O, 8, 512], va.f32 [64, 2], id.i32 [4]; O offsets are stored, 8 in a full set.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jmt_dist.data.geometry import CLIPS, OFFSETS, SUBSEQUENCE
from jmt_dist.data.pipeline import derive_seed
from jmt_dist.errors import UserError

WIDTH = 512


class FeatureWriter:
    """Writes one rank's features of one part of a fold to `<folder>/<part>-<rank:05d>.tar`, published by one rename."""

    def __init__(self, folder: Path, part: str, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{part}-{rank:05d}.tar"
        self._temporary = self.path.with_suffix(".tar.tmp")
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 closed in close()
        self._count = 0

    def add(self, ident: NDArray[Any], visual: Tensor, audio: Tensor, labels: NDArray[Any]) -> None:
        """One sample: ident [4], visual and audio [O, 8, 512], labels [64, 2] of its end frames n = q + 8 j (NaN = none)."""
        unit, m, p = (int(value) for value in ident[:3])
        members = {
            "visual.f16": visual.to(torch.float16).cpu().numpy(),
            "audio.f16": audio.to(torch.float16).cpu().numpy(),
            "va.f32": labels.astype("<f4"),
            "id.i32": ident.astype("<i4"),
        }
        for name, values in members.items():
            data = np.ascontiguousarray(values).tobytes()
            info = tarfile.TarInfo(f"{unit:05d}-{m:04d}-{p}.{name}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._count += 1

    def close(self) -> None:
        """Finish the tar and give it its final name."""
        self._tar.close()
        os.replace(self._temporary, self.path)


def write_description(folder: Path, offsets: Sequence[int], ranks: int) -> None:
    """What the tars of a folder hold; written last, by one rank, when all tars are there."""
    temporary = folder / "features.json.tmp"
    temporary.write_text(json.dumps({"version": 1, "offsets": list(offsets), "ranks": ranks, "width": WIDTH}))
    os.replace(temporary, folder / "features.json")


@dataclass(frozen=True)
class FeatureSet:
    """All features of one part of a fold, in the order of (unit, segment, phase) whatever wrote them.

    visual, audio [S, O, 8, 512] float16; labels [S, 64, 2] float32 of the end frames n = q + 8 j (NaN = none), whatever offsets
    are stored; ident [S, 4] int32; offsets: the O stored offsets.
    """

    visual: NDArray[np.float16]
    audio: NDArray[np.float16]
    labels: NDArray[np.float32]
    ident: NDArray[np.int32]
    offsets: tuple[int, ...]

    def va(self) -> NDArray[np.float32]:
        """Labels [S, O, 8, 2] of the clips of the stored offsets."""
        by_offset = self.labels.reshape(-1, CLIPS, OFFSETS, 2).swapaxes(1, 2)
        return by_offset[:, list(self.offsets)]

    def select(self, offsets: Sequence[int]) -> FeatureSet:
        """The same samples at some of the stored offsets."""
        places = [self.offsets.index(offset) for offset in offsets]
        return FeatureSet(self.visual[:, places], self.audio[:, places], self.labels, self.ident, tuple(offsets))


def read_features(folder: Path, part: str) -> FeatureSet:
    """Read one part ("train", "validation" or "test") of a features folder. Raises UserError where it is missing or damaged."""
    try:
        description = json.loads((folder / "features.json").read_text())
    except (OSError, json.JSONDecodeError):
        raise UserError(f"{folder} holds no finished features", "Run the features stage of this fold first.") from None
    offsets = tuple(description["offsets"])
    rows: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob(f"{part}-*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, member = info.name.split(".", 1)
                source = tar.extractfile(info)
                assert source is not None
                rows.setdefault(key, {})[member] = source.read()
    if not rows:
        raise UserError(f"{folder} holds no features of part {part}", "Run the features stage of this fold again.")
    shape = (len(rows), len(offsets), CLIPS)

    def stack(member: str, dtype: str, tail: tuple[int, ...]) -> NDArray[Any]:
        try:
            return np.stack([np.frombuffer(rows[key][member], dtype) for key in sorted(rows)]).reshape(tail)
        except (KeyError, ValueError):
            raise UserError(f"{folder} has incomplete features of part {part}", "Run the features stage of this fold again.") from None

    return FeatureSet(
        stack("visual.f16", "<f2", (*shape, WIDTH)),
        stack("audio.f16", "<f2", (*shape, WIDTH)),
        stack("va.f32", "<f4", (len(rows), SUBSEQUENCE, 2)),
        stack("id.i32", "<i4", (len(rows), 4)),
        offsets,
    )


def epoch_order(samples: int, offsets: int, passes: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The passes of an epoch (DESIGN section 2): pass r is an array [S, 2] of (sample, offset place).

    In pass r sample i takes its offset π_{i,epoch}(r), a permutation of its own, so that no offset of a sample comes twice
    in an epoch; the samples of a pass are in random order.
    """
    generator = np.random.default_rng(derive_seed("order", seed, epoch))
    permutations = generator.permuted(np.tile(np.arange(offsets), (samples, 1)), axis=1)
    return [np.stack([order, permutations[order, r]], axis=1) for r in range(passes) for order in [generator.permutation(samples)]]


class FeatureLoader:
    """Training batches from features, divided over `ranks` ranks; further ranks get an unlabelled sample and so add nothing.

    Batches: visual, audio [B, 8, 512] float32, va [B, 8, 2] (NaN = no label), id [B, 4], q [B]. The last batch of each pass may
    hold fewer subsequences; no batch holds two offsets of one sample. The order does not depend on the number of ranks.
    """

    def __init__(
        self, features: FeatureSet, *, batch: int, passes: int, seed: int, rank: int = 0, ranks: int = 1, device: torch.device | None = None
    ) -> None:
        self.features, self.batch, self.passes, self.seed = features, batch, passes, seed
        self.rank, self.ranks, self.device = rank, ranks, device or torch.device("cpu")
        self._va = features.va()
        self._per_pass = -(-len(features.ident) // batch)
        self.steps = self._per_pass * passes

    def batches(self, epoch: int = 0, done: int = 0) -> Iterator[dict[str, Tensor]]:
        """The steps of epoch `epoch` after the first `done`."""
        order = epoch_order(len(self.features.ident), len(self.features.offsets), self.passes, self.seed, epoch)
        for step in range(done, self.steps):
            rows = order[step // self._per_pass][(step % self._per_pass) * self.batch :][: self.batch]
            yield self._batch(np.array_split(rows, self.ranks)[self.rank] if self.rank < self.ranks else rows[:0])

    def _batch(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        blank = len(rows) == 0  # a rank without a share still takes part in every reduction
        rows = np.zeros((1, 2), np.int64) if blank else rows
        sample, place = rows[:, 0], rows[:, 1]
        va = torch.from_numpy(self._va[sample, place])
        if blank:
            va.fill_(float("nan"))
        found = {
            "visual": torch.from_numpy(self.features.visual[sample, place].astype(np.float32)),
            "audio": torch.from_numpy(self.features.audio[sample, place].astype(np.float32)),
            "va": va,
            "id": torch.from_numpy(self.features.ident[sample]),
            "q": torch.tensor([self.features.offsets[k] for k in place]),
        }
        return {name: value.to(self.device) for name, value in found.items()}

    def state(self) -> dict[str, Any]:
        """Nothing beyond epoch and step, which the training loop keeps: the order is a function of them."""
        return {"samples": len(self.features.ident), "batch": self.batch, "passes": self.passes}

    def restore(self, state: dict[str, Any]) -> None:
        """Check that a state belongs to the same features and batch."""
        if state != self.state():
            raise UserError(f"the saved order was made for {state}, now {self.state()}", "Resume with the same features and batch.")

    def redivide(self, states: Sequence[dict[str, Any]]) -> None:
        """The same as `restore`: the order does not depend on the number of ranks, so the rest of an epoch divides by itself."""
        for state in states:
            self.restore(state)


__all__ = ["FeatureLoader", "FeatureSet", "FeatureWriter", "epoch_order", "read_features", "write_description"]
