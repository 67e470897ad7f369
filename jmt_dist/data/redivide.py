"""What is left of an interrupted epoch, as index files for another number of ranks (DESIGN section 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jmt_dist.data.sample import parse_key
from jmt_dist.data.shards import ShardSet, read_manifest
from jmt_dist.data.tars import Entry, index_text, parse_index
from jmt_dist.errors import UserError

SAME_STEP = ("world", "batch", "epoch", "done", "draw")  # what the states of one interrupted job have in common


def consumed(states: Sequence[dict[str, Any]]) -> Tensor:
    """The samples [K, 3] (unit, segment, phase) that all ranks of an interrupted job have had in their epoch, each once.

    `states` are `ClipLoader.state()` of every rank, in any order. Raises UserError: a rank is missing or there twice, or the
    states were not taken after the same step.
    """
    worlds = {state["world"] for state in states}
    ranks = sorted(state["rank"] for state in states)
    if len(worlds) != 1 or ranks != list(range(*worlds)):
        raise UserError(
            f"the loader states are of ranks {ranks} of {' and '.join(map(str, sorted(worlds))) or 'no'} ranks, not one of each rank",
            "Give the states of all ranks of one checkpoint.",
        )
    other = [name for name in SAME_STEP if len({state[name] for state in states}) > 1]
    if other:
        raise UserError(f"the ranks' loader states differ in {', '.join(other)}", "Give the states of all ranks of one checkpoint.")
    return torch.cat([state[part] for state in states for part in ("before", "seen")]).unique(dim=0)


def write_rest(shards: ShardSet, had: Tensor, ranks: int, folder: Path) -> ShardSet:
    """The samples of `shards` that are not in `had` [K, 3] (unit, segment, phase), as new index files in `folder` over the same tars.

    At least one sample must be left. Where fewer are left than `ranks` they are repeated to that number: DALI gives no rank an
    empty share, and a training batch is filled up with repeats in any case.
    """
    manifest = read_manifest(shards.tars[0].parent)
    names = {(manifest.units[unit].name, m, p) for unit, m, p in had.tolist()}
    return _write(shards, lambda key: key not in names, ranks, folder)


def write_phases(shards: ShardSet, phases: Sequence[int], folder: Path) -> ShardSet:
    """The samples of `shards` of some phases, as new index files in `folder`. Raises UserError where there are none."""
    chosen = _write(shards, lambda key: key[2] in phases, 0, folder)
    if not chosen.tars:
        raise UserError(f"no sample is of phases {list(phases)}", "Units of fewer rows than four do not have all phases: add phase 0.")
    return chosen


def _write(shards: ShardSet, keep: Callable[[tuple[str, int, int]], bool], ranks: int, folder: Path) -> ShardSet:
    left: list[tuple[Path, Entry]] = []
    for tar, index in zip(shards.tars, shards.indexes, strict=True):
        entries = parse_index(index.read_text(encoding="ascii"))
        left += [(tar, entry) for entry in entries if keep(parse_key(entry.key))]
    left += islice(cycle(left), max(0, ranks - len(left)))
    by_tar: dict[Path, list[Entry]] = {}  # a tar without a sample does not appear: DALI fails on an empty index
    for tar, entry in left:
        by_tar.setdefault(tar, []).append(entry)
    indexes = tuple(folder / tar.with_suffix(".idx").name for tar in by_tar)
    for path, entries in zip(indexes, by_tar.values(), strict=True):
        path.write_text(index_text(entries), encoding="ascii")
    return ShardSet(tuple(by_tar), indexes, len(left), shards.manifest_hash, shards.index_hash)
