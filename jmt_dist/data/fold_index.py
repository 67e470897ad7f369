"""Index files of folds: five divisions of the samples without a copy of one (DESIGN section 6)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from jmt_dist.affwild2.folds import Folds, make_folds, write_folds
from jmt_dist.config import FoldOptions
from jmt_dist.data.sample import parse_key
from jmt_dist.data.shards import FOLDS_FILE, Manifest, fold_folder
from jmt_dist.data.tars import Entry, index_text, parse_index

PARTS = ("train", "validation")


def divide_units(manifest: Manifest, options: FoldOptions) -> Folds:
    """The folds of a manifest's units. Raises UserError where there are too few videos."""
    return make_folds((unit.summary() for unit in manifest.units), options)


def parts_of(folds: Folds, manifest: Manifest) -> list[tuple[str, frozenset[str]]]:
    """(folder below the fold folder, units) of every index set: each part of each fold, and `test`."""
    parts = [(f"{fold}/{name}", frozenset(units)) for fold, both in folds.units.items() for name, units in zip(PARTS, both, strict=True)]
    return [*parts, ("test", frozenset(unit.name for unit in manifest.units if unit.split == "test"))]


def write_fold_indexes(manifest: Manifest, options: FoldOptions, folds: Folds) -> Path:
    """Write folds.json and all index files of a policy and seed; the folder appears by one rename. Returns it."""
    target = fold_folder(manifest.folder, options)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parts = parts_of(folds, manifest)
    for shard in manifest.shards:
        entries = parse_index((manifest.folder / shard.index).read_text(encoding="ascii"))
        units = [parse_key(entry.key)[0] for entry in entries]
        for folder, names in parts:
            _write_part(partial / folder / shard.index, (e for e, unit in zip(entries, units, strict=True) if unit in names))
    write_folds(partial / FOLDS_FILE, folds)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    return target


def _write_part(path: Path, entries: Iterable[Entry]) -> None:
    chosen = list(entries)
    if chosen:  # DALI fails on an index without samples
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(index_text(chosen), encoding="ascii")
