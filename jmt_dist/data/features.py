"""Features of the frozen backbones as arrays, divided into batches (DESIGN section 6); `feature_tars` has their files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jmt_dist.data.feature_tars import AGAIN, read_description, records
from jmt_dist.data.geometry import CLIPS, OFFSETS
from jmt_dist.data.pipeline import derive_seed
from jmt_dist.errors import UserError

Floats = NDArray[np.floating[Any]]


class Rows:
    """Rows of several files as one array in an order of its own: `rows[i, k]` with index arrays i, k is [..., 8, 512]."""

    def __init__(self, files: Sequence[Floats], file: NDArray[np.int64], row: NDArray[np.int64]) -> None:
        self.files, self.file, self.row = files, file, row

    def __getitem__(self, index: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Floats:
        samples, places = index
        file, row = self.file[samples], self.row[samples]
        if len(self.files) == 1 or (file == file[0]).all():
            return self.files[file[0]][row, places]
        return np.stack([self.files[f][r, place] for f, r, place in zip(file, row, places, strict=True)])


@dataclass(frozen=True)
class FeatureSet:
    """All features of one part of a fold, in the order of (unit, segment, phase) whatever wrote them.

    visual, audio: [S, K, 8, 512], arrays or `Rows`; labels [S, 64, 2] float32 of the end frames n = q + 8 j (NaN = none), whatever
    offsets are stored; ident [S, 4] int32; offsets: O of the K stored offsets; places [O]: where those lie among the K.
    """

    visual: Floats | Rows
    audio: Floats | Rows
    labels: NDArray[np.float32]
    ident: NDArray[np.int32]
    offsets: tuple[int, ...]
    places: tuple[int, ...] = ()
    back: int = 0  # `geometry.LABEL_BACK` of the recipe's label position

    def __post_init__(self) -> None:
        if not self.places:
            object.__setattr__(self, "places", tuple(range(len(self.offsets))))

    def va(self) -> NDArray[np.float32]:
        """Labels [S, O, 8, 2] of the clips of the offsets."""
        labels = self.labels
        if self.back:
            labels = np.concatenate([np.full_like(labels[:, : self.back], np.nan), labels[:, : -self.back]], axis=1)
        by_offset = labels.reshape(-1, CLIPS, OFFSETS, 2).swapaxes(1, 2)
        return by_offset[:, list(self.offsets)]

    def take(self, samples: NDArray[np.int64], offsets: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Visual and audio features [B, 8, 512] float32 of B samples, each at its own one of the O offsets (by number 0..O-1)."""
        places = np.asarray(self.places)[offsets]
        return self.visual[samples, places].astype(np.float32), self.audio[samples, places].astype(np.float32)

    def select(self, offsets: Sequence[int]) -> FeatureSet:
        """The same samples at some of the stored offsets; nothing is copied."""
        return replace(self, offsets=tuple(offsets), places=tuple(self.places[self.offsets.index(offset)] for offset in offsets))

    def of_phases(self, phases: Sequence[int]) -> FeatureSet:
        """The samples of some phases. Raises UserError where there are none."""
        chosen = np.flatnonzero(np.isin(self.ident[:, 2], list(phases)))
        if not len(chosen):
            raise UserError(f"no sample is of phases {list(phases)}", "Units of fewer rows than four do not have all phases: add phase 0.")
        visual, audio = (
            Rows(rows.files, rows.file[chosen], rows.row[chosen]) if isinstance(rows, Rows) else rows[chosen]
            for rows in (self.visual, self.audio)
        )
        return replace(self, visual=visual, audio=audio, labels=self.labels[chosen], ident=self.ident[chosen])


def read_features(folder: Path, part: str, mmap: bool = True) -> FeatureSet:
    """One part ("train", "validation" or "test") of a features folder, mapped, or with `mmap=False` read into memory.

    Raises UserError where it is missing or not whole; `feature_tars.feature_damage` compares the bytes.
    """
    description = read_description(folder)
    offsets = description.offsets
    files = [records(path, len(offsets), description.dtype, mmap) for path in description.of(folder, part)]
    if not files:
        raise UserError(f"{folder} holds no features of part {part}", AGAIN)
    ident = np.concatenate([file["id"] for file in files])
    # a job of more ranks than samples left repeats some (`write_rest`): of equal ones the first counts
    _, order = np.unique(ident[:, :3], axis=0, return_index=True)
    file = np.concatenate([np.full(len(found), number) for number, found in enumerate(files)])[order]
    row = np.concatenate([np.arange(len(found)) for found in files])[order]
    visual, audio = (Rows([found[stream] for found in files], file, row) for stream in ("visual", "audio"))
    return FeatureSet(visual, audio, np.concatenate([found["va"] for found in files])[order], ident[order], offsets)


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
        visual, audio = self.features.take(sample, place)
        found = {
            "visual": torch.from_numpy(visual),
            "audio": torch.from_numpy(audio),
            "va": va,
            "id": torch.from_numpy(self.features.ident[sample]),
            "q": torch.tensor([self.features.offsets[k] for k in place]),
        }
        if self.device.type == "cuda":  # from pinned memory, so that nobody waits for the copy
            return {name: value.pin_memory().to(self.device, non_blocking=True) for name, value in found.items()}
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
