"""What the sections of bench_gpu.py share: sizes, data, the device, timing."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import cores
from pydantic import Field
from trees import fixture, packed

from jmt_dist.config import Count, Options, Positive
from jmt_dist.data.shards import Manifest, ShardSet
from jmt_dist.errors import UserError

GIGA, TERA = 1e9, 1e12


class GpuBench(Options):
    """Sizes; the defaults are the paper's."""

    device: str = Field("cuda", description="cuda, or cpu for a dry run")
    small: bool = Field(False, description="tiny sizes, one repeat: a dry run of all code")
    minutes: Positive = Field(8, description="sections that would begin later are left out")
    sections: list[str] = Field(
        ["ceilings", "visual_steps", "visual_end_to_end", "decode", "audio", "features", "fusion", "hours"], description="what runs"
    )
    units: Positive = Field(8, ge=6, description="units of the fixture (folds need six)")
    rows: Positive = Field(2048, description="frames per unit; 64 of them make a sample")
    rounds: Positive = Field(3, description="rounds of comparisons; both sides run in each")
    repeats: Positive = Field(5, description="timed repetitions of one thing alone, after the first")
    size: Positive = Field(224, description="side of the visual input")
    depth: Positive = Field(18, description="layers of R(2+1)D")
    batch: Positive = Field(8, description="subsequences per visual step")
    larger: list[int] = Field([12, 16], description="larger batches tried with the fastest visual setting")
    decode_batches: list[int] = Field([8, 32, 64], description="strips per batch of the decoder")
    audio_batch: Positive = Field(64, description="subsequences per audio step")
    feature_batch: Positive = Field(8, description="samples per forward pass of the features stage")
    fusion_batches: list[int] = Field([2, 256], description="subsequences per fusion step")
    matrix: Positive = Field(8192, description="side of the matrices that give the bf16 rate")
    copy_mb: Positive = Field(2048, description="size of the copies that give the bandwidths")
    workers: Count = Field(0, description="worker processes of the PyTorch loaders; 0 = one per core, 16 at most")

    def smaller(self) -> GpuBench:
        """The same at tiny sizes."""
        tiny: dict[str, Any] = {
            "units": 6, "rows": 128, "rounds": 1, "repeats": 1, "size": 32, "depth": 10, "batch": 2, "larger": [3], "decode_batches": [2],
            "audio_batch": 2, "feature_batch": 2, "fusion_batches": [2], "matrix": 256, "copy_mb": 8, "workers": 1,
        }  # fmt: skip
        return self.model_copy(update=tiny)


@dataclass(frozen=True)
class Setting:
    """The options, the device and its name, and a packed fixture in a folder that `close` removes."""

    options: GpuBench
    device: torch.device
    name: str
    folder: Path
    source: Path
    manifest: Manifest

    @property
    def shards(self) -> ShardSet:
        """All samples."""
        manifest = self.manifest
        tars = tuple(manifest.folder / shard.name for shard in manifest.shards)
        return ShardSet(tars, tuple(manifest.folder / shard.index for shard in manifest.shards), manifest.samples, manifest.hash, "all")

    @property
    def workers(self) -> int:
        """Processes of the loaders we compare with."""
        return self.options.workers or min(16, cores())

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], Any], warm: int = 2) -> float:
        """Median seconds of `function` alone, after `warm` runs that load, compile and allocate."""
        for _ in range(warm):
            function()
        found = []
        for _ in range(self.options.repeats):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def peak_gb(self) -> float | None:
        """Most memory of the device that tensors held since the last call; None without a GPU."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.device) / GIGA
        torch.cuda.reset_peak_memory_stats(self.device)
        return round(peak, 2)

    def close(self) -> None:
        """Remove the data."""
        shutil.rmtree(self.folder)


def prepare(options: GpuBench, out: Path) -> Setting:
    """Join the device, write and pack the fixture."""
    if options.device not in ("cuda", "cpu"):
        raise UserError(f"device={options.device} is neither cuda nor cpu", "Give device=cuda, or device=cpu for a dry run.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU here", "Give small=true device=cpu for a dry run without one.")
    from jmt_dist.train.ranks import choose_device, start

    device = choose_device(options.device)
    start(device)
    folder = Path(tempfile.mkdtemp(prefix=".data-", dir=out))
    source = fixture(folder, options.units, options.rows, cores())
    manifest = packed(source, "wav", cores())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Setting(options, device, name, folder, source, manifest)


def rate(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
