"""CPU, memory, GPU and I/O of the machine a fold runs on, sampled into its spool by a thread (DESIGN section 12).

MLflow's own monitors measure, under its own names (`system/cpu_utilization_percentage`, …: its pages have a tab for them);
they see the whole node of rank 0. What the process of rank 0 takes of it is `system/process_…`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psutil

from jmt_dist.track.spool import Spool

CLOCK = "system/cpu_utilization_percentage"  # its last step tells a resumed job where to go on


class SystemMetrics:
    """Samples every `seconds` from `start()` to `stop()`; the first sample comes after that time, 0 seconds: none.

    A monitor that fails is left out from then on, and named in `problem`: a measurement never costs a run.
    """

    def __init__(self, spool: Spool, seconds: float) -> None:
        self.spool, self.seconds, self.problem = spool, seconds, ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start sampling, where there is a spool to write to."""
        if self.spool.folder is not None and self.seconds > 0:
            self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """No sample after this; one under way may still take a moment, and is waited for."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        step = self.spool.next_step(CLOCK)
        psutil.cpu_percent()  # the first call of a process has nothing to compare with, and returns 0
        monitors: list[Callable[[], dict[str, float]]] | None = None
        while not self._stop.wait(self.seconds):
            monitors = self._monitors() if monitors is None else monitors
            values: dict[str, float] = {}
            for monitor in list(monitors):
                try:
                    values |= monitor()
                except Exception as error:
                    monitors.remove(monitor)
                    self.problem = f"{type(error).__name__}: {error}"
            if not self._stop.is_set():
                self.spool.metrics({f"system/{name}": value for name, value in values.items()}, step)
                step += 1

    def _monitors(self) -> list[Callable[[], dict[str, float]]]:
        # imported by the first sample: MLflow takes 1.5 s, which a short run is spared
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        found: list[Callable[[], dict[str, float]]] = [_process()]
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            try:
                found.append(_of(kind()))
            except (ImportError, RuntimeError):  # no GPU, or no driver
                continue
        return found


def _of(monitor: Any) -> Callable[[], dict[str, float]]:
    def sample() -> dict[str, float]:
        monitor.collect_metrics()
        values = dict(monitor.aggregate_metrics())
        monitor.clear_metrics()
        return values

    return sample


def _process() -> Callable[[], dict[str, float]]:
    """Memory in use, and MB read from and written to files since the process began (page cache and pipes included)."""
    process = psutil.Process()

    def sample() -> dict[str, float]:
        values = {"process_memory_megabytes": process.memory_info().rss / 1e6}
        if hasattr(process, "io_counters"):  # not on macOS
            counters: Any = process.io_counters()
            read = getattr(counters, "read_chars", counters.read_bytes)
            written = getattr(counters, "write_chars", counters.write_bytes)
            values |= {"process_read_megabytes": read / 1e6, "process_write_megabytes": written / 1e6}
        return values

    return sample
