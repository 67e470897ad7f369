"""One small tree, packed once for all tests of the room that only read."""

from __future__ import annotations

from pathlib import Path

import pytest

from jmt_dist.config import FoldOptions, PackOptions
from jmt_dist.data.pack import pack

from .tree import write_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="session")
def packed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 samples in 5 shards; to be read only."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    options = PackOptions(source=str(tree), out=str(out), samples_per_shard=8, workers=1, folds=FoldOptions())
    pack(options, say=lambda line: None)
    return out
