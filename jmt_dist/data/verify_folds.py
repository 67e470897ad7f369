"""Fold indexes against folds.json and the shards: complete, from the right tars, no video on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jmt_dist.affwild2.folds import Folds, read_folds
from jmt_dist.config import OFFICIAL
from jmt_dist.data.fold_index import parts_of
from jmt_dist.data.sample import parse_key
from jmt_dist.data.shards import FOLDS, FOLDS_FILE, Manifest
from jmt_dist.data.tars import index_text, parse_index
from jmt_dist.errors import UserError

Problem = tuple[str, str]  # file relative to the shard folder, what


def verify_folds(manifest: Manifest) -> Iterator[Problem]:
    """Problems of every fold folder of a shard folder."""
    full = {}
    for shard in manifest.shards:
        try:
            full[shard.index] = parse_index((manifest.folder / shard.index).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue  # named by the verification of the shard
    for path in sorted(manifest.folder.glob(f"{FOLDS}/*/{FOLDS_FILE}")):
        if path.parent.name.startswith("."):
            continue
        name = str(path.relative_to(manifest.folder))
        try:
            folds = read_folds(path)
        except UserError as error:
            yield name, error.sentence
            continue
        for what in _division(folds, manifest):
            yield name, what
        keyed = {index: [(parse_key(e.key)[0], e) for e in entries] for index, entries in full.items()}
        for folder, units in parts_of(folds, manifest):
            base = path.parent / folder
            wanted = {index: [e for unit, e in entries if unit in units] for index, entries in keyed.items()}
            for index, entries in wanted.items():
                yield from _file(manifest.folder, base / index, index_text(entries) if entries else None)
            for extra in sorted(base.glob("*")):
                if extra.name not in wanted:
                    yield str(extra.relative_to(manifest.folder)), "index of no shard"


def _file(root: Path, path: Path, wanted: str | None) -> Iterator[Problem]:
    name = str(path.relative_to(root))
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        if wanted is not None:
            yield name, "index is missing"
    except (OSError, UnicodeDecodeError) as error:
        yield name, f"cannot be read: {error}"
    else:
        if text != wanted:
            yield name, "is not what folds.json and the shard's index say"


def _division(folds: Folds, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the division itself."""
    units = {unit.name: unit for unit in manifest.units if unit.split != "test"}
    for fold, (train, validation) in folds.units.items():
        for name in sorted({*train, *validation} - units.keys()):
            yield f"{fold} names unit {name}, which is not an annotated unit of the manifest"
        both = {units[n].video for n in train if n in units} & {units[n].video for n in validation if n in units}
        for video in sorted(both):
            yield f"{fold} has video {video} in training and validation"
    pool = {name for name, unit in units.items() if folds.policy == "train+validation" or unit.split == "train"}
    parts = [set(validation) for fold, (_, validation) in folds.units.items() if fold != OFFICIAL]
    for name in sorted(pool - set().union(*parts)):
        yield f"unit {name} is in the validation part of no fold"
    for name in sorted(name for name in pool if sum(name in part for part in parts) > 1):
        yield f"unit {name} is in the validation parts of several folds"
    for name in sorted(units.keys() - {n for part in folds.units.get(OFFICIAL, ((), ())) for n in part}):
        yield f"unit {name} is not in {OFFICIAL}"
