"""Progress of a long pass, and the processes that make it: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from jmt_dist.errors import UserError
from jmt_dist.program import begin_worker

T = TypeVar("T")
R = TypeVar("R")
LOG_SECONDS = 15.0  # between lines in a log


class Progress:
    """Counts up to `total`. `what` names the pass, `noun` what is counted."""

    def __init__(self, what: str, total: int, noun: str) -> None:
        self.what, self.total, self.noun, self.done = what, total, noun, 0
        self._start = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich import progress

            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn())
            self._bar = progress.Progress(*columns, progress.TextColumn(self.noun), progress.TimeRemainingColumn())
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total)
        return self

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif time.monotonic() - self._last >= LOG_SECONDS and self.done < self.total:
            self._last = time.monotonic()
            left = (self._last - self._start) / self.done * (self.total - self.done)
            print(f"{self.what}: {self.done} of {self.total} {self.noun}, about {left:.0f} s left", flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            print(f"{self.what}: {self.done} {self.noun} in {time.monotonic() - self._start:.1f} s", flush=True)


def in_processes(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Results of `function` over `tasks` as they come, from up to `workers` processes (1: in this one).

    An exception of a task ends the others. Raises UserError where a process is killed from outside.
    """
    tasks = list(tasks)
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    # a server that has imported what the tasks need forks the workers: at once, and without this process's threads and locks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    pool = ProcessPoolExecutor(workers, context, begin_worker)
    try:
        for future in as_completed([pool.submit(function, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for want of memory", "Run the same command with fewer workers.") from None
    finally:
        pool.shutdown(cancel_futures=True)
