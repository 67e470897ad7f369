"""Shards whose samples hold ids and labels only, or a given sound: order and restart are tested without pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jmt_dist.data.sample import Sample, key
from jmt_dist.data.shards import Manifest, PackedUnit, Shard, ShardSet
from jmt_dist.data.tars import ShardWriter, index_text

SEGMENTS = 5  # of each unit, in one phase only


def numbered(count: int) -> list[tuple[int, int, int]]:
    """(unit, segment, phase) of `count` samples."""
    return [(k // SEGMENTS, k % SEGMENTS, k % 4) for k in range(count)]


def tiny_sample(ident: tuple[int, int, int], sound: bytes = b"-", ends: NDArray[np.int32] | None = None) -> Sample:
    """A sample without a picture; the label of its clip end n is (unit + n / 1000, segment)."""
    n = np.arange(64)
    va = np.stack([ident[0] + n / 1000, np.full(64, ident[1])], axis=1).astype(np.float32)
    ends = np.full(64, 47_040, np.int32) if ends is None else ends
    return Sample(b"-", sound, "wav", ends, va, np.ones(71, np.uint8), np.array([*ident, 0], np.int32))


def write_tiny(folder: Path, counts: Sequence[int], samples: Sequence[Sample] | None = None) -> ShardSet:
    """A shard folder of `counts[k]` samples in tar k, with its manifest; samples are `samples` or those of `numbered`."""
    folder.mkdir(parents=True)
    samples = samples or [tiny_sample(ident) for ident in numbered(sum(counts))]
    units = [PackedUnit(f"u.{k}", f"v{k}", "Train_Set", 256, 256, (1,)) for k in range(1 + max(int(sample.id[0]) for sample in samples))]
    left = list(np.random.default_rng(0).permutation(len(samples)))
    shards = []
    for number, count in enumerate(counts):
        path = folder / f"{number:05d}.tar"
        with ShardWriter(path) as tar:
            for place in left[:count]:
                unit, m, p = samples[place].id[:3].tolist()
                tar.add(key(units[unit].name, m, p), samples[place].members())
        del left[:count]
        path.with_suffix(".idx").write_text(index_text(tar.entries))
        shards.append(Shard(path.name, count, tar.size, tar.sha256))
    manifest = Manifest(folder, "tiny", {}, tuple(units), tuple(shards))
    (folder / "manifest.json").write_text(manifest.to_json())
    tars = tuple(folder / shard.name for shard in shards)
    return ShardSet(tars, tuple(tar.with_suffix(".idx") for tar in tars), len(samples), manifest.hash, f"all-{len(samples)}")
