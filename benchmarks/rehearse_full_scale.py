"""The real dataset's size, once: 594 units, 2,993,081 rows and crops, packed with FLAC, verified, folded and indexed on two cores.

    python benchmarks/rehearse_full_scale.py --json benchmarks/results
    python benchmarks/rehearse_full_scale.py scale=0.01        a short trial

Crops are hard links to a few thousand distinct JPEGs, so reading them is warmer than a real disk; sound is a repeated voice in AAC.
Disk: looked at first; where less is free than needed, the scale goes down and the result says so. Everything made is removed at the end.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from common import REPOSITORY, Memory, Result, median, run, use_cores
from pydantic import Field
from scale_tree import plan, write_tree
from trees import fixture

from jmt_dist.affwild2.fixture import CROPS
from jmt_dist.config import Options, Positive
from jmt_dist.data.geometry import samples_of
from jmt_dist.data.sample import AudioKind
from jmt_dist.errors import UserError

PASS = re.compile(r"(pass \d|verify)[^:]*: (\d+) \w+ in ([0-9.]+) s")
TREE_BYTES, PCM_BYTES = 700, 2940  # per row: videos, labels and folders of the tree; sound laid down while packing
SHARD_BYTES = {"flac": 11_300, "wav": 18_500}  # per row, folds and indexes included
RESERVE = 3e9  # stays free for whoever else uses the disk
SMALLEST = 0.005
STEP = 24  # videos whose sound comes or goes between two entries of the result


class Rehearsal(Options):
    """What is rehearsed."""

    scale: Annotated[float, Field(ge=SMALLEST, le=1)] = Field(1.0, description="share of the units of the real dataset")
    workers: Positive = Field(2, description="processes of the packer and the verifier, and cores")
    audio: AudioKind = Field("flac", description="sound of the shards")
    max_gb: Annotated[float, Field(gt=0)] = Field(60.0, description="disk space that may be used; the scale goes down for it")
    units: Positive = Field(16, ge=6, description="people of the fixture whose crops are linked")
    rows: Positive = Field(256, description="distinct crops of each of them")
    against: bool = Field(True, description="verify against the source files, too")


@dataclass
class Watch:
    """Disk used by the shards while a program makes them, and how many videos have their sound laid down."""

    shards: Path
    peak_bytes: int = 0
    pcm: list[tuple[float, int]] = field(default_factory=list)  # (seconds, files) at every STEP files
    _start: float = field(default_factory=time.monotonic)

    def __call__(self) -> None:
        """Look."""
        self.peak_bytes = max(self.peak_bytes, disk_of(self.shards))
        files = sum(1 for _ in self.shards.glob(".work/videos/*/pcm.npy"))
        if not self.pcm or abs(self.pcm[-1][1] - files) >= STEP or (files == 0 and self.pcm[-1][1]):
            self.pcm.append((round(time.monotonic() - self._start, 1), files))


def disk_of(folder: Path, skip: str = "") -> int:
    """Bytes of the disk blocks of all below `folder`; files (not folders) of folders below one named `skip` are left out."""
    total = 0
    for parent, _, names in os.walk(folder):
        inside = skip and skip in Path(parent).parts
        for path in (parent, *(() if inside else (os.path.join(parent, name) for name in names))):
            try:
                total += os.lstat(path).st_blocks * 512
            except OSError:
                continue  # a file of the program at work has just gone
    return total


def bench(options: Rehearsal, out: Path) -> Result:
    """Check the disk, make the tree, run the programs, give the disk back."""
    use_cores(options.workers)
    folder = out / "full-scale"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    free = shutil.disk_usage(folder).free
    scale, need = fitting(options, free)
    with removed(folder):
        start = time.perf_counter()
        distinct = fixture(folder, options.units, options.rows, options.workers)
        units = plan(scale)
        people = [sorted(person.iterdir()) for person in sorted(distinct.glob("cropped_aligned/*"))]
        print(f"tree of {len(units)} units, {sum(unit.rows for unit in units):,} rows, crops of {len(people)} people", flush=True)
        write_tree(folder / "source", units, people)
        made = time.perf_counter() - start
        tree = disk_of(folder / "source", skip=CROPS) + disk_of(distinct)
        watch = Watch(folder / "shards")
        packing = _program("pack_shards", watch, [f"source={folder}/source", f"out={folder}/shards", f"audio={options.audio}"], options)
        against = [f"against={folder}/source"] if options.against else []
        verifying = _program("verify_shards", watch, [f"shards={folder}/shards", *against], options)
        files = [path for path in (folder / "shards").rglob("*") if path.is_file()]
        sizes = sum(path.stat().st_size for path in files)
    rows = sum(unit.rows for unit in units)
    samples = sum(len(samples_of(unit.rows)) for unit in units)
    values = {
        "scale": scale,
        "scale_asked": options.scale,
        "scaled_down_because": "" if scale == options.scale else f"{free / 1e9:.0f} GB were free, max_gb={options.max_gb:g}",
        "units": len(units),
        "rows": rows,
        "samples": samples,
        "distinct_crops": sum(len(person) for person in people),
        "seconds": {"tree": round(made, 1), **packing["seconds"], **verifying["seconds"]},
        "hours_packing": median([packing["seconds"]["pack_shards"] / 3600]),
        "minutes_both_passes": median([(packing["seconds"]["pass 1"] + packing["seconds"]["pass 2"]) / 60]),
        "rows_per_s_packing": median([rows / packing["seconds"]["pack_shards"]]),
        "peak_mb": {"pack_shards": packing["peak_mb"], "verify_shards": verifying["peak_mb"]},
        "bytes": {"shards": sizes, "per_row": round(sizes / rows), "peak_disk": tree + watch.peak_bytes, "expected_disk": int(need)},
        "files": {"crops": rows, "shards": len(files)},
        "pcm_caches": {"videos": len({unit.video for unit in units}), "seconds_and_files": watch.pcm},
        "verified": verifying["last"].replace(f"{folder}/", ""),  # a result names no place of the machine it was made on
    }
    return Result(values, _table(values))


def fitting(options: Rehearsal, free: float) -> tuple[float, float]:
    """(scale, bytes it needs): what was asked for, or what the disk and `max_gb` allow. Raises UserError: not even the smallest."""
    rows = 2_993_081
    each = TREE_BYTES + PCM_BYTES + SHARD_BYTES[options.audio]
    allowed = min(options.max_gb * 1e9, free - RESERVE)
    # the packer itself wants 5 % more than it expects to write
    scale = min(options.scale, allowed / (1.05 * rows * each))
    if scale < SMALLEST:
        raise UserError(f"{free / 1e9:.1f} GB are free, too little for any rehearsal", "Free some space, or give --out on another disk.")
    if scale < options.scale:
        scale = float(f"{scale:.2g}") if float(f"{scale:.2g}") <= scale else float(f"{scale - 0.005:.2g}")
        print(f"{free / 1e9:.0f} GB are free, {options.max_gb:g} GB allowed: scale {scale:g} instead of {options.scale:g}", flush=True)
    return scale, scale * rows * each


@contextmanager
def removed(folder: Path) -> Iterator[None]:
    """Remove the folder at the end, after an error, Ctrl-C or SIGTERM too."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        print(f"removing {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():  # a worker that was ending has written once more
            time.sleep(2)
            shutil.rmtree(folder)


def _program(name: str, watch: Watch, words: list[str], options: Rehearsal) -> dict[str, Any]:
    """Run a program of shards/: seconds of it and of its passes, peak memory, its last lines."""
    command = [sys.executable, str(REPOSITORY / "shards" / f"{name}.py"), *words, f"workers={options.workers}"]
    lines: list[str] = []
    start = time.perf_counter()
    # a group of its own, so that its workers end with it where this program is stopped
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            with Memory(process.pid, interval=0.1, watch=watch) as memory:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    lines.append(line.rstrip())
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode:
        raise UserError(f"{name}.py ended with exit code {process.returncode}", "What it printed above says why.")
    seconds = {name: round(time.perf_counter() - start, 1)}
    seconds |= {found[1]: float(found[3]) for found in map(PASS.search, lines) if found}
    peaks = {"largest_process": round(memory.own), "all_processes": round(memory.all), "with_mapped_files": round(memory.resident)}
    return {"seconds": seconds, "peak_mb": peaks, "last": next((line for line in reversed(lines) if "verified" in line), "")}


def _table(values: dict[str, Any]) -> list[list[str]]:
    peaks = values["peak_mb"]["pack_shards"]
    seconds = ", ".join(f"{name} {found:,.0f}" for name, found in values["seconds"].items())
    rows = [
        ["units, rows, samples", f"{values['units']:,}, {values['rows']:,}, {values['samples']:,} (scale {values['scale']:g})"],
        ["seconds", seconds],
        ["both passes", f"{values['minutes_both_passes']:.1f} minutes"],
        ["peak memory, packing", f"{peaks['largest_process']:,} MB in the largest process, {peaks['all_processes']:,} MB in all"],
        ["shards", f"{values['bytes']['shards'] / 1e9:.2f} GB in {values['files']['shards']:,} files"],
        ["disk at most", f"{values['bytes']['peak_disk'] / 1e9:.2f} GB, given back"],
        ["verified", values["verified"]],
    ]
    return [["full scale", "found"], *rows]


if __name__ == "__main__":
    run(bench, __doc__ or "", Rehearsal, "full-scale")
