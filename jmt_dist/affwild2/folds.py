"""Folds: the dataset's own split and five divisions of its annotated units, grouped by video.

`official` is the split as shipped. `fold-1` .. `fold-5` each validate on one of five parts. The parts are
made of whole videos, so that the two people of one video never stand on both sides, and are balanced by
labelled frames, by number of videos and by the joint distribution of valence and arousal (DESIGN section 5).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jmt_dist.config import OFFICIAL, FoldOptions
from jmt_dist.errors import UserError

PARTS = 5
BINS = 5  # of [-1, 1], per target: 25 cells of 0.4 x 0.4
JITTER = 0.25  # how far the seed disturbs the order of sizes in which videos are dealt out
VERSION = 1


@dataclass(frozen=True)
class UnitSummary:
    """What a division into folds needs to know of a unit: `valid` labelled frames and where in V/A space they lie."""

    name: str
    video: str
    split: str  # train, validation or test
    valid: int
    histogram: tuple[int, ...]  # [BINS * BINS] frames per cell, valence-major


def summarise(name: str, video: str, split: str, va: NDArray[np.float32]) -> UnitSummary:
    """Summary of a unit's labels, float32 [N, 2] in [-1, 1], NaN where there is none."""
    labelled = va[~np.isnan(va).any(axis=1)].astype(np.float64)
    cells = np.clip(np.floor((labelled + 1) / 2 * BINS), 0, BINS - 1).astype(np.int64)
    counts = np.bincount(cells @ np.array([BINS, 1]), minlength=BINS * BINS)
    return UnitSummary(name, video, split, len(labelled), tuple(int(count) for count in counts))


@dataclass(frozen=True)
class Folds:
    """Names of the training and validation units of every fold, sorted; test units are in none."""

    policy: str
    seed: int
    units: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]  # fold -> (training, validation)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the folds, `official` first."""
        return tuple(self.units)

    def train(self, fold: str) -> tuple[str, ...]:
        """Training units of a fold. Raises UserError: no such fold, or it has none."""
        return self._part(fold, 0, "training")

    def validation(self, fold: str) -> tuple[str, ...]:
        """Validation units of a fold. Raises UserError: no such fold, or it has none."""
        return self._part(fold, 1, "validation")

    def _part(self, fold: str, index: int, what: str) -> tuple[str, ...]:
        if fold not in self.units:
            raise UserError(f"there is no fold `{fold}`", f"Folds are: {', '.join(self.names)}.")
        part = self.units[fold][index]
        if not part:
            raise UserError(f"fold `{fold}` has no {what} units", "Choose another fold or check the label folders of the dataset.")
        return part

    @cached_property
    def hash(self) -> str:
        """sha256 of the canonical JSON: names the division, whoever computed it."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        folds = {name: {"train": list(train), "validation": list(validation)} for name, (train, validation) in self.units.items()}
        return {"version": VERSION, "policy": self.policy, "seed": self.seed, "folds": folds}

    def to_json(self) -> str:
        """The folds as JSON text, with their hash."""
        return json.dumps({"hash": self.hash, **self._content()}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str = "the folds") -> Folds:
        """Folds of `to_json`; `origin` is how an error calls the text. A missing hash is accepted, a wrong one is not.

        Raises UserError: not JSON, another version, a part missing, or changed after it was written.
        """
        try:
            data = json.loads(text)
            version = data["version"]
            if version != VERSION:
                raise UserError(f"{origin} has version {version}, not {VERSION}", "Pack the shards again with this version.")
            units = {
                str(name): (tuple(sorted(map(str, fold["train"]))), tuple(sorted(map(str, fold["validation"]))))
                for name, fold in data["folds"].items()
            }
            folds = cls(str(data["policy"]), int(data["seed"]), units)
            claimed = data.get("hash", folds.hash)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{origin} is not a list of folds", "Pack the shards again, or restore the file.") from None
        if claimed != folds.hash:
            raise UserError(f"{origin} was changed after it was written", "Restore it, or remove its `hash` line to accept the change.")
        return folds


def make_folds(units: Iterable[UnitSummary], options: FoldOptions) -> Folds:
    """Divide units into folds by the policy of `options`; the order of `units` does not matter.

    `train+validation`: the five parts divide both. `train-only`: they divide the training units, and the
    official validation units join every training set, except those that share a video with that fold's part.
    Raises UserError: fewer videos than parts, or a name given twice.
    """
    given = sorted(units, key=lambda unit: unit.name)
    for one, other in pairwise(given):
        if one.name == other.name:
            raise UserError(f"unit `{one.name}` is given twice", "Keep one of its label files.")
    train = [unit for unit in given if unit.split == "train"]
    validation = [unit for unit in given if unit.split == "validation"]
    pool, always = (train, validation) if options.policy == "train-only" else (sorted(train + validation, key=lambda u: u.name), [])
    folds = {OFFICIAL: (_names(train), _names(validation))}
    for number, videos in enumerate(divide(pool, options.seed), start=1):
        inside = [unit for unit in pool if unit.video in videos]
        outside = [unit for unit in pool + always if unit.video not in videos]
        folds[f"fold-{number}"] = (_names(outside), _names(inside))
    return Folds(options.policy, options.seed, folds)


def divide(units: list[UnitSummary], seed: int) -> list[frozenset[str]]:
    """Five balanced sets of videos.

    Videos are dealt out, large ones first, each to the part whose totals are then nearest to a fifth of
    everything; then single moves and swaps are made as long as they bring the parts nearer.
    """
    videos = sorted({unit.video for unit in units})
    if len(videos) < PARTS:
        raise UserError(f"{len(videos)} videos cannot be divided into {PARTS} folds", f"Use a dataset of {PARTS} or more annotated videos.")
    place = {video: i for i, video in enumerate(videos)}
    # columns: frames per cell, frames, and videos counted so that all of them weigh as much as all frames;
    # whole numbers throughout, so that every machine finds the same parts
    features = np.zeros((len(videos), BINS * BINS + 2), np.int64)
    for unit in units:
        features[place[unit.video]] += [*unit.histogram, unit.valid, 0]
    features[:, -1] = max(int(features[:, -2].sum()) // len(videos), 1)
    noise = np.array([int(hashlib.sha256(f"{seed}/{video}".encode()).hexdigest()[:13], 16) / 16**13 for video in videos])
    order = np.argsort(-features[:, -2] * (1 + JITTER * noise), kind="stable")
    part = _deal(features, order)
    _improve(features, part)
    return [frozenset(video for video, k in zip(videos, part, strict=True) if k == number) for number in range(PARTS)]


def _deal(features: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Part [videos] of each video, dealt greedily; cost of a part = squared distance of its totals from a fifth."""
    part = np.full(len(features), -1)
    sums = np.zeros((PARTS, features.shape[1]), np.int64)
    total = features.sum(axis=0)
    for i in order:
        cost = (PARTS * sums - total) @ features[i]  # growth of the cost, less what is equal for all parts
        part[i] = int(np.argmin(cost))
        sums[part[i]] += features[i]
    return part


def _improve(features: NDArray[np.int64], part: NDArray[np.int64]) -> None:
    """Move videos and swap pairs, in place, always the best step of all, while the summed cost of the parts falls.

    The cost falls by whole numbers, so this ends. No part loses its last video i: there `own` is i's square, the gain negative.
    """
    products = features @ features.T
    squares = np.diag(products)
    everyone = np.arange(len(part))
    while True:
        overlap = features @ np.stack([features[part == k].sum(axis=0) for k in range(PARTS)]).T  # [videos, PARTS]
        own = overlap[everyone, part]
        move = own[:, None] - overlap - squares[:, None]  # [videos, PARTS]: halved gain of moving one
        there = overlap[:, part]  # [i, j]: overlap of i with the part of j
        distance = squares[:, None] + squares[None, :] - 2 * products
        swap = own[:, None] + own[None, :] - there - there.T - distance  # [videos, videos]: halved gain of a swap
        if max(move.max(), swap.max()) <= 0:
            return
        if move.max() >= swap.max():
            i, k = divmod(int(move.argmax()), PARTS)
            part[i] = k
        else:
            i, j = divmod(int(swap.argmax()), len(part))
            part[i], part[j] = part[j], part[i]


def _names(units: Iterable[UnitSummary]) -> tuple[str, ...]:
    return tuple(sorted(unit.name for unit in units))


def write_folds(path: Path, folds: Folds) -> None:
    """Write folds as JSON; the file appears by one rename."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(folds.to_json(), encoding="utf-8")
    partial.replace(path)


def read_folds(path: Path) -> Folds:
    """Folds of a file. Raises UserError: missing, or as `Folds.from_json`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"there are no folds in {path}", "Pack the shards with these fold options first.") from None
    return Folds.from_json(text, str(path))
