"""Data of the benchmarks: the fixture, and larger trees made of its files by hard links."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from jmt_dist.affwild2.fixture import make_fixture
from jmt_dist.config import FixtureOptions, FoldOptions, PackOptions
from jmt_dist.data.pack import pack
from jmt_dist.data.sample import AudioKind
from jmt_dist.data.shards import Manifest


def fixture(out: Path, units: int, rows: int, workers: int) -> Path:
    """A fixture without irregularities in `out`/fixture-<units>x<rows>: made once, found again later."""
    folder = out / f"fixture-{units}x{rows}"
    print(f"fixture of {units} units of {rows} rows in {folder}", flush=True)
    made = make_fixture(FixtureOptions(out=str(folder), units=units, test_units=0, rows=rows, gotchas="none", workers=workers))
    return made.out


def packed(source: Path, audio: AudioKind, workers: int) -> Manifest:
    """`source` packed beside it: made once, found again later."""
    out = source.with_name(f"{source.name}-{audio}")
    options = PackOptions(source=str(source), out=str(out), audio=audio, samples_per_shard=32, workers=workers, folds=FoldOptions())
    manifest = pack(options).manifest
    assert manifest is not None  # only a dry run has none
    return manifest


def multiplied(source: Path, out: Path, times: int) -> Path:
    """A tree of `times` copies of every unit and video of a fixture: new names, hard links to the same bytes."""
    if out.is_dir():
        return out
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(source.rglob("*")):
        if path.is_dir() or path.name == "fixture.json":
            continue
        relative = path.relative_to(source)
        for k in range(times):
            # the name of a unit or video is that of a crop's folder, or of a video's or label's file; 0.. keeps sides (_left) last
            parts = list(relative.parts)
            place = -2 if relative.parts[0].startswith("cropped") else -1
            parts[place] = f"c{k}{parts[place]}"
            target = partial.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    partial.replace(out)
    return out


def size_of(paths: list[Path], disk: bool) -> int:
    """Bytes of files: as they read, or as the `disk` blocks they fill."""
    return sum((path.stat().st_blocks * 512) if disk else path.stat().st_size for path in paths)
