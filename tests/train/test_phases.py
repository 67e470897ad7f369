"""Training on some phases of the segments, on nodes whose copies of the shards lie in unlike places."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jmt_dist.data.shards import ShardSet
from jmt_dist.data.tars import Entry, index_text, parse_index
from tests.ranks import run_ranks

TARS = {"a.tar": ["u1-0000-0", "u1-0000-1"], "b.tar": ["u1-0001-3"], "c.tar": ["u2-0000-0"]}


def chosen(rank: int, folder: Path) -> tuple[list[str], list[str]]:
    """The tars that a rank reads, whose copies lie in a folder of its own, and the samples it reads of them."""
    from jmt_dist.train.backbone import training_shards

    own = tuple(folder / f"disk-of-node-{rank}" / name for name in TARS)
    indexes = tuple(folder / Path(name).with_suffix(".idx") for name in TARS)
    plan: Any = SimpleNamespace(parts={"train": ShardSet(own, indexes, 4, "manifest", "index")})
    found = training_shards(plan, folder, [0])
    return [str(tar) for tar in found.tars], [entry.key for index in found.indexes for entry in parse_index(index.read_text())]


def test_each_node_reads_its_own_copies(tmp_path: Path) -> None:
    for name, keys in TARS.items():
        (tmp_path / name).with_suffix(".idx").write_text(index_text([Entry(key, (("id.i32", 512, 16),)) for key in keys]))
    for rank, (tars, keys) in enumerate(run_ranks(2, chosen, tmp_path)):
        assert tars == [f"{tmp_path}/disk-of-node-{rank}/{name}" for name in ("a.tar", "c.tar")]
        assert keys == ["u1-0000-0", "u2-0000-0"]
