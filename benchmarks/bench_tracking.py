"""What tracking costs a training step: our spool, against MLflow called from the training loop.

    python benchmarks/bench_tracking.py --json benchmarks/results

A step is a matrix product of some milliseconds and one call that records five metrics. Sides, all in one process tree and in turn:
`none` records nothing; `spool` sends to a SQLite file by its thread; `spool_server` to a real `mlflow server`; `spool_hanging` to a
socket that accepts and never answers; `mlflow_sqlite` and `mlflow_server` are `MlflowClient.log_batch` in the loop, as in scripts.
`delay_us` is the time of the recording call, `step_ms` that of the whole step: what the thread takes from the processor is in it.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import REPOSITORY, Result, alternate, median, run
from pydantic import Field

from jmt_dist.config import Options, Positive
from jmt_dist.track.spool import read_metrics
from jmt_dist.track.tracker import Tracker, client_environment, connect, create_child, create_experiment

NAMES = ("train/loss", "train/lr", "val/ccc_valence", "val/ccc_arousal", "val/ccc_mean")
Log = Callable[[dict[str, float], int], None]


class TrackingBench(Options):
    """How much is measured."""

    steps: Positive = Field(400, description="steps per round and side")
    rounds: Positive = Field(5, description="rounds; every side runs once in each")
    size: Positive = Field(300, description="rows of the square matrices whose product is a step's work")


def bench(options: TrackingBench, out: Path) -> Result:
    """Measure every side in turn and compare the calls."""
    delays: dict[str, list[float]] = {}
    with served(out) as server, hanging() as silent, client_environment():
        sqlite = f"sqlite:///{out}/bench.db"
        sides: dict[str, Callable[[], float]] = {
            name: lambda name=name, around=around: measure(name, around, options, delays)  # type: ignore[misc]
            for name, around in {
                "none": lambda: contextlib.nullcontext(lambda values, step: None),
                "spool": lambda: spooled(out, "spool", sqlite),
                "spool_server": lambda: spooled(out, "spool_server", server),
                "spool_hanging": lambda: spooled(out, "spool_hanging", silent),
                "mlflow_sqlite": lambda: direct(sqlite),
                "mlflow_server": lambda: direct(server),
            }.items()
        }
        steps = alternate(sides, options.rounds)
    calls = {name: statistics.median(values) * 1e6 for name, values in delays.items()}
    values: dict[str, Any] = {
        "delay_us": {name: float(f"{value:.4g}") for name, value in calls.items()},
        "delay_us_99_of_100": {name: float(f"{np.percentile(values, 99) * 1e6:.4g}") for name, values in delays.items()},
        "delay_us_longest": {name: float(f"{max(values) * 1e6:.4g}") for name, values in delays.items()},
        "step_ms": {name: median(found) for name, found in steps.items()},
        "ratio_mlflow_sqlite_to_spool": float(f"{calls['mlflow_sqlite'] / calls['spool']:.3g}"),
        "ratio_mlflow_server_to_spool": float(f"{calls['mlflow_server'] / calls['spool_server']:.3g}"),
        "ratio_hanging_to_living": float(f"{calls['spool_hanging'] / calls['spool_server']:.3g}"),
    }
    head = ["side", "call, us: median", "99 of 100 below", "longest", "whole step, ms"]
    rows = [
        [name, f"{calls[name]:,.0f}", *(f"{values[key][name]:,.0f}" for key in ("delay_us_99_of_100", "delay_us_longest")), f"{found:.3f}"]
        for name, found in values["step_ms"].items()
    ]
    return Result(values, [head, *rows])


def measure(name: str, around: Callable[[], Any], options: TrackingBench, delays: dict[str, list[float]]) -> float:
    """Milliseconds of a whole step, the mean over a round; the delay of each call goes to `delays`."""
    matrix = np.random.default_rng(0).standard_normal((options.size, options.size), dtype=np.float32)
    with around() as log:
        found, started = [], time.perf_counter()
        for step in range(options.steps):
            np.linalg.multi_dot([matrix, matrix, matrix])
            before = time.perf_counter()
            log(dict.fromkeys(NAMES, step / 3), step)
            found.append(time.perf_counter() - before)
        whole = (time.perf_counter() - started) / options.steps * 1e3
    delays.setdefault(name, []).extend(found)
    return whole


@contextlib.contextmanager
def spooled(out: Path, name: str, uri: str) -> Iterator[Log]:
    """A fold's tracker on a new run, its thread at work before the first step; afterwards every point must be in the spool."""
    folder = out / "folds" / f"{name}-{time.time_ns()}" / "spool"
    alive = "hanging" not in name
    run_id = create_child(create_experiment(uri, "bench", {}, {}), "official") if alive else "0" * 32
    steps = 0
    with Tracker(folder, uri, run_id) as tracker:
        tracker.spool.metrics({"begin": 0.0}, 0)
        while alive and not tracker.report.sent:
            time.sleep(0.05)
        time.sleep(0 if alive else 3)  # it has asked, and waits

        def log(values: dict[str, float], step: int) -> None:
            nonlocal steps
            tracker.spool.metrics(values, step)
            steps += 1

        yield log
    curves = read_metrics(folder)
    assert all(len(curves[metric]) == steps for metric in NAMES), "a metric is missing"


@contextlib.contextmanager
def direct(uri: str) -> Iterator[Log]:
    """MLflow's own client in the loop."""
    from mlflow.entities import Metric

    run_id, client = create_child(create_experiment(uri, "bench", {}, {}), "official"), connect(uri)

    def log(values: dict[str, float], step: int) -> None:
        now = time.time_ns() // 1_000_000
        client.log_batch(run_id, [Metric(key, value, now, step) for key, value in values.items()])

    yield log


@contextlib.contextmanager
def hanging() -> Iterator[str]:
    """The address of a socket that accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def served(out: Path) -> Iterator[str]:
    """The address of our tracking server with one worker and a SQLite file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [f"out={out / 'server'}", f"port={port}", "workers=1"]
    command = [sys.executable, str(REPOSITORY / "launch" / "serve_tracking.py"), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert any(line.startswith("http://") for line in iter(process.stdout.readline, "")), "the server does not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


if __name__ == "__main__":
    run(bench, __doc__ or "", TrackingBench, "tracking", ("mlflow",))
