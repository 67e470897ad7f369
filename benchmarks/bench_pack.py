"""Packing: frames per second of one core from loose files in a warm cache, memory on 1x and 8x data, bytes against the loose files.

    python benchmarks/bench_pack.py --json benchmarks/results
    python benchmarks/bench_pack.py rounds=1 units=6 rows=256        a short trial

Each round packs both trees with the real program and one process. A frame is a source frame, counted once: strips hold 71 / 64 as many.
`frames_per_s_per_core` is of pass 2, which reads the loose files; pass 1 decodes the sound of the videos and is given beside it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import REPOSITORY, Memory, Result, alternate, median, run, spread, use_cores
from pydantic import Field
from trees import fixture, multiplied, size_of

from jmt_dist.config import Options, Positive
from jmt_dist.data.geometry import STRIP, SUBSEQUENCE
from jmt_dist.data.sample import AUDIO_MEMBERS, STRIP_MEMBER, AudioKind
from jmt_dist.errors import UserError

PASS = re.compile(r"pass ([12]), .*: \d+ \w+ in ([0-9.]+) s")


class PackBench(Options):
    """What is packed."""

    units: Positive = Field(12, ge=6, description="units of the fixture (folds need six)")
    rows: Positive = Field(1024, description="frames per unit")
    times: Positive = Field(8, ge=2, description="the larger tree has so many times the units, as hard links")
    rounds: Positive = Field(5, description="rounds; both trees are packed once in each")
    audio: AudioKind = Field("wav", description="sound of the shards")


class Packing:
    """Packs one tree again and again; keeps what each time came to."""

    def __init__(self, source: Path, out: Path, audio: AudioKind) -> None:
        self.source, self.out, self.audio = source, out, audio
        self.rows = 0
        self.seconds: dict[str, list[float]] = {"pass 1": [], "pass 2": [], "whole": []}
        self.memory: list[Memory] = []

    def __call__(self) -> float:
        """Source frames per second of pass 2."""
        shutil.rmtree(self.out, ignore_errors=True)
        words = [f"source={self.source}", f"out={self.out}", f"audio={self.audio}", "workers=1"]
        start = time.perf_counter()
        with (
            subprocess.Popen(
                [sys.executable, str(REPOSITORY / "shards" / "pack_shards.py"), *words], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
            ) as process,
            Memory(process.pid) as memory,
        ):
            printed = process.stdout.read() if process.stdout else ""
        if process.returncode:
            raise UserError(f"packing {self.source} ended with exit code {process.returncode}", "Its last lines above say why.")
        self.seconds["whole"].append(time.perf_counter() - start)
        for number, seconds in PASS.findall(printed):
            self.seconds[f"pass {number}"].append(float(seconds))
        self.memory.append(memory)
        units = json.loads((self.out / "manifest.json").read_text(encoding="utf-8"))["units"]
        self.rows = sum(unit["rows"] for unit in units)
        return self.rows / self.seconds["pass 2"][-1]

    def rate(self, what: str) -> float:
        """Median source frames per second of a pass or of the whole program, start and survey included."""
        return median([self.rows / seconds for seconds in self.seconds[what]])


def bench(options: PackBench, out: Path) -> Result:
    """Make both trees, pack them in turn, weigh the result."""
    use_cores(1)
    small = fixture(out, options.units, options.rows, 1)
    large = multiplied(small, out / f"{small.name}-times-{options.times}", options.times)
    packings = {
        "1x": Packing(small, out / "packed-small", options.audio),
        f"{options.times}x": Packing(large, out / "packed-large", options.audio),
    }
    packings["1x"]()  # fills the page cache; the larger tree is links to the same bytes
    for packing in packings.values():
        packing.seconds, packing.memory = {name: [] for name in packing.seconds}, []
    found = alternate(packings, options.rounds)
    weights = _weigh(small, packings["1x"].out, options.audio)
    values = {
        "frames_per_s_per_core": median(found[f"{options.times}x"]),
        "pass_1_frames_per_s_per_core": packings[f"{options.times}x"].rate("pass 1"),
        "whole_frames_per_s_per_core": packings[f"{options.times}x"].rate("whole"),
        "peak_mb": {name: median([memory.own for memory in packing.memory]) for name, packing in packings.items()},
        "peak_resident_mb": {name: median([memory.resident for memory in packing.memory]) for name, packing in packings.items()},
        **weights,
        "frames": {name: packing.rows for name, packing in packings.items()},
        "rounds": {name: [round(rate, 1) for rate in rates] for name, rates in found.items()},
    }
    for name in packings:
        shutil.rmtree(packings[name].out)
    return Result(values, _table(found, packings, weights))


def _weigh(source: Path, shards: Path, audio: AudioKind) -> dict[str, Any]:
    """Bytes against those of the loose files, as read (`bytes_ratio`) and as they fill the disk.

    bytes_ratio: strips with their tar headers and padding, per frame they hold, against the crops. bytes_ratio_all: the shard folder
    against crops, labels and one PCM16 WAV per video, which the shards hold four to five times (each phase has its own sound).
    """
    crops = sorted(source.glob("cropped_aligned*/*/*.jpg"))
    kinds = Counter[str]()
    for extension, size in _members(shards):
        kinds[extension] += 512 + -(-size // 512) * 512
    frames = json.loads((shards / "pack-report.json").read_text(encoding="utf-8"))
    stored = sum(shard["frames"] for shard in frames["shards"])
    per_frame, crop = kinds[STRIP_MEMBER] / stored, size_of(crops, disk=False) / len(crops)
    folder = [path for path in shards.rglob("*") if path.is_file()]
    sound = _sound_bytes(source)
    loose = [*crops, *source.glob("annotations/*/*/*.txt")]
    return {
        "bytes_ratio": median([per_frame / crop]),
        "bytes_ratio_disk": median([per_frame / (size_of(crops, disk=True) / len(crops))]),
        "bytes_ratio_all": median([size_of(folder, disk=False) / (size_of(loose, disk=False) + sound)]),
        "bytes_ratio_all_disk": median([size_of(folder, disk=True) / (size_of(loose, disk=True) + sound)]),
        "bytes_per_source_frame": {
            "strip": median([kinds[STRIP_MEMBER] / len(crops)]),
            audio: median([kinds[AUDIO_MEMBERS[audio]] / len(crops)]),
            "loose crop": median([crop]),
        },
        "files": {"loose": len(crops), "shards": len(folder)},
    }


def _members(shards: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                yield info.name.partition(".")[2], info.size


def _sound_bytes(source: Path) -> int:
    """Bytes of the videos' sound as mono PCM16 at 44.1 kHz."""
    from jmt_dist.affwild2.layout import find_dataset
    from jmt_dist.affwild2.media import read_audio

    media = {unit.media for unit in find_dataset(source).units if unit.media is not None}
    return sum(2 * len(pcm) for pcm in map(read_audio, sorted(media)) if pcm is not None)


def _table(found: dict[str, list[float]], packings: dict[str, Packing], weights: dict[str, Any]) -> list[list[str]]:
    head = ["data", "frames", "pass 2 frames/s, median [least-most]", "pass 1", "whole", "peak MB", "with mapped files"]
    rows = []
    for name, packing in packings.items():
        peaks = [f"{median([getattr(memory, what) for memory in packing.memory]):.0f}" for what in ("own", "resident")]
        speeds = [spread(found[name]), f"{packing.rate('pass 1'):,.0f}", f"{packing.rate('whole'):,.0f}"]
        rows.append([name, f"{packing.rows:,}", *speeds, *peaks])
    ratio = f"{weights['bytes_ratio']:.3f} of the loose crops' bytes, {weights['bytes_ratio_disk']:.3f} of their disk blocks"
    return [head, *rows, [f"strips: {ratio} (a strip repeats {STRIP - SUBSEQUENCE} frames in {STRIP})", *[""] * (len(head) - 1)]]


if __name__ == "__main__":
    run(bench, __doc__ or "", PackBench, "pack")
