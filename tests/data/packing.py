"""What the tests of packing share: options for the small tree, and what lies in a shard folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jmt_dist.config import PackOptions
from jmt_dist.data.sample import Sample
from jmt_dist.data.tars import parse_index, read_entry


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
