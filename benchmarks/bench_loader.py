"""Our loader against loose files, litdata, mosaicml-streaming and webdataset: the same tensors from the same frames.

    python benchmarks/bench_loader.py --json benchmarks/results
    python benchmarks/bench_loader.py rounds=2 units=6        a short trial

Before anything is timed, what every loader delivers is held against Pillow, librosa and the label files.
A round times each loader over an epoch less its first batches; ratios are of medians over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import Result, alternate, cpu_seconds, median, run, spread, use_cores
from loader_data import Reference, loose_samples
from loader_sides import OURS, PIL, SIDES, Batch, Epochs, Setting
from pydantic import Field
from trees import fixture, packed

from jmt_dist.config import Options, Positive
from jmt_dist.data.geometry import SUBSEQUENCE
from jmt_dist.data.sample import AudioKind
from jmt_dist.errors import UserError


class LoaderBench(Options):
    """What is compared."""

    units: Positive = Field(24, ge=6, description="units of the fixture (folds need six)")
    rows: Positive = Field(1024, description="frames per unit; 64 of them make a sample")
    rounds: Positive = Field(7, description="rounds; every loader runs once in each")
    batch: Positive = Field(16, description="samples per batch")
    skip: Positive = Field(4, description="batches at the start of an epoch that are not timed: queues fill")
    cores: Positive = Field(2, description="processor cores; the peers' worker processes are as many")
    threads: Positive = Field(2, description="threads of our DALI pipeline, on the same cores")
    checked: Positive = Field(48, description="samples of each loader that are held against the reference")
    audio: AudioKind = Field("wav", description="sound in our shards; the peers' formats hold PCM")
    loaders: list[str] = Field(list(SIDES), description="which loaders run")


def bench(options: LoaderBench, out: Path) -> Result:
    """Prepare, compare, time."""
    unknown = [name for name in options.loaders if name not in SIDES]
    if unknown or OURS not in options.loaders:
        raise UserError(f"loaders={options.loaders} is not a choice with {OURS} in it", f"Loaders are: {', '.join(SIDES)}.")
    use_cores(options.cores)
    torch.set_num_threads(options.cores)
    source = fixture(out, options.units, options.rows, options.cores)
    manifest = packed(source, options.audio, options.cores)
    loose = loose_samples(source, manifest, source.with_name(f"{source.name}-clips"))
    setting = Setting(manifest, loose, out, options.batch, options.cores, options.threads)
    reference = Reference(source, manifest, options.checked)
    sides = {name: _prepared(name, setting) for name in options.loaders}
    for name, epochs in sides.items():
        _agrees(name, epochs, reference, options.batch)
    # the epoch just compared has filled the page cache and started every worker
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    found = alternate({name: _timed(epochs, options.skip, cpu[name]) for name, epochs in sides.items()}, options.rounds)
    rates = {name: [SUBSEQUENCE * rate for rate in values] for name, values in found.items()}
    counts = {"samples": len(loose), "samples_compared": len(reference.samples)}
    return _result(rates, {name: median(values) for name, values in cpu.items()}, counts)


def _prepared(name: str, setting: Setting) -> Epochs:
    print(f"preparing {name}", flush=True)
    try:
        return SIDES[name](setting)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name} cannot run: there is no module {error.name}", "Install the peers as benchmarks/README.md says, or give loaders=[…]."
        ) from None


def _agrees(name: str, epochs: Epochs, reference: Reference, batch: int) -> None:
    """One whole epoch: every sample comes, none but the filling of the last batch twice, and what comes is right."""
    ids = [ident for found in epochs() for ident in reference.compare(found, name)]
    if set(ids) != reference.all or len(ids) - len(reference.all) >= batch:
        raise AssertionError(f"{name} delivers {len(ids)} samples, {len(set(ids))} different ones, of {len(reference.all)}")
    print(f"{name}: {len(ids)} samples, {len(reference.samples)} of them compared", flush=True)


def _timed(epochs: Epochs, skip: int, cpu: list[float]) -> Callable[[], float]:
    """A function that runs an epoch and returns samples per second after the first `skip` batches.

    To `cpu` it adds the processor's milliseconds per sample: they say what a loader costs where a machine is not idle.
    """

    def rate() -> float:
        batches: Iterator[Batch] = epochs()
        for _ in range(skip):
            next(batches)
        start, used, count = time.perf_counter(), cpu_seconds(), 0
        for batch in batches:
            count += len(batch["id"])
        seconds = time.perf_counter() - start
        cpu.append(1000 * (cpu_seconds() - used) / count)
        return count / seconds

    return rate


def _result(rates: dict[str, list[float]], cpu: dict[str, float], counts: dict[str, int]) -> Result:
    medians = {name: median(values) for name, values in rates.items()}
    peers = {name: value for name, value in medians.items() if name not in (OURS, PIL)}
    best = max(peers, key=lambda name: peers[name], default=None)
    values = {
        "frames_per_s": medians[OURS],
        "ratio_vs_pil": median([medians[OURS] / medians[PIL]]) if PIL in medians else None,
        "ratio_vs_best_peer": median([medians[OURS] / peers[best]]) if best else None,
        "best_peer": best,
        "loaders": {
            name: {
                "frames_per_s": medians[name],
                "ratio": median([medians[OURS] / medians[name]]),
                "cpu_ms_per_sample": cpu[name],
                "rounds": [round(rate, 1) for rate in found],
            }
            for name, found in rates.items()
        },
        **counts,
    }
    head = ["loader", "frames/s, median [least-most]", f"{OURS} is faster by", "CPU ms per sample"]
    rows = [[name, spread(found), f"{medians[OURS] / medians[name]:.2f}", f"{cpu[name]:.1f}"] for name, found in rates.items()]
    return Result(values, [head, *rows])


if __name__ == "__main__":
    run(bench, __doc__ or "", LoaderBench, "loader", ("litdata", "mosaicml-streaming", "simplejpeg", "librosa"))
