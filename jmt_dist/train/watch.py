"""Ends a rank that hangs, or whose job another rank has left: with one sentence and a dump of its stacks (DESIGN section 10).

A rank that waits in a collective for one that will never come cannot notice it by itself. A thread of each rank looks every half
second at two things: whether training has moved on, and whether another rank has left a notice in the job's store.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from jmt_dist.errors import UserError
from jmt_dist.train.ranks import rank, world

POLL = 0.5  # seconds between two looks
HEARD = 5.0  # seconds a failing rank waits for the others to hear why
GRACE = 20.0  # seconds a rank has to end by itself once another has failed
STUCK = 120.0  # seconds beyond the limit after which stacks are dumped even where the interpreter lock is never released

Failed = Callable[[str, bool], None]
_starts = 0  # jobs of this process so far: their notices share one store


class Watch:
    """Watches one rank between `with Watch(...) as watch:` and its end; without `with` its methods do nothing.

    `seconds`: after so long without a `beat` the rank hangs; 0 = never. `folder`: where stacks are dumped. `failed(sentence, again)`
    is called before the process ends: `again` says whether a new start may mend it. `damage()` names a damaged file, if there is
    one, after a bus error: the answer of the system to reading past the end of a mapped file that was cut short.
    """

    def __init__(
        self, seconds: int = 0, folder: Path | None = None, failed: Failed | None = None, damage: Callable[[], str] | None = None
    ) -> None:
        self.seconds, self.folder, self.failed, self.damage = seconds, folder, failed or (lambda sentence, again: None), damage
        self._place, self._idle, self._alone, self._paused = "before its first step", 0.0, False, 0
        self._notice: dict[str, Any] | None = None
        self._heard = 0.0  # when another rank's notice was seen
        self._end = threading.Event()
        self._store: Any = None
        self._name = ""

    def beat(self, place: str, *, alone: bool = False) -> None:
        """Training has moved on, and is now at `place`; `alone`: what it does there waits for no other rank."""
        self._place, self._idle, self._alone = place, 0.0, alone

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside may take any time: a save, the evaluation."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._idle = 0.0

    def __enter__(self) -> Watch:
        global _starts
        _starts += 1
        self._name = f"jmt-notice-{_starts}"
        if world() > 1:
            self._store = dist.distributed_c10d._get_default_store()
        if threading.current_thread() is threading.main_thread():
            self._catch_bus_errors()
        self._arm()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGBUS, signal.SIG_DFL)

    def settle(self, error: Exception) -> Exception:
        """What this rank raises for `error`: itself, after the other ranks have been told; or, where one of them was first, theirs."""
        if self._store is None:
            return error
        again = not isinstance(error, UserError)
        sentence, remedy = (error.sentence, error.remedy) if isinstance(error, UserError) else (f"{type(error).__name__}: {error}", "")
        theirs = self._tell({"rank": rank(), "sentence": sentence, "remedy": remedy, "again": again, "hangs": False})
        if theirs is None or theirs["sentence"] == sentence:
            return error
        line = f"rank {rank()} stopped because rank {theirs['rank']} did: {theirs['sentence']}"
        return RuntimeError(line) if theirs["again"] else UserError(line, theirs["remedy"])

    def _tell(self, notice: dict[str, Any]) -> dict[str, Any] | None:
        """Leave a notice, and wait until every rank has seen it; the first rank's notice, where this rank is not the first."""
        try:
            first = json.loads(self._store.compare_set(self._name, "", json.dumps(notice)).decode())
            if first["rank"] != rank():
                self._hear(first)
                return dict(first)
            end = time.monotonic() + HEARD
            while self._store.add(f"{self._name}-heard", 0) < world() - 1 and time.monotonic() < end:
                time.sleep(0.05)
        except (RuntimeError, ValueError):  # the store is rank 0's, and gone with it
            return self._notice
        return None

    def _hear(self, notice: dict[str, Any]) -> None:
        if self._notice is None:
            self._notice, self._heard = notice, time.monotonic()
            self._store.add(f"{self._name}-heard", 1)

    def _look(self) -> None:
        rearm = 0.0
        while not self._end.wait(POLL):
            # looks are counted, not the clock: a job that was suspended has not hung
            self._idle += 0.0 if self._paused else POLL
            rearm -= POLL
            if rearm <= 0:
                self._arm()
                rearm = 10.0
            self._listen()
            if self._notice is not None and (self._notice["hangs"] or time.monotonic() - self._heard > GRACE):
                line = f"ended because rank {self._notice['rank']} {'hangs' if self._notice['hangs'] else 'failed'}"
                self._leave(f"{line}: {self._notice['sentence']}; this rank was at {self._place}", self._notice["again"])
            # a rank that may be waiting for another lets that one speak first
            if self.seconds and self._idle > self.seconds * (1 if self._alone else 1.25):
                self._stop(f"nothing has moved for {self.seconds} s (site.hang_seconds): {self._place}", True, hangs=True)

    def _arm(self) -> None:
        # a timer in C, for a rank that holds the interpreter lock for ever and so stops the thread of this watch too
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds + STUCK, exit=True, file=2)

    def _listen(self) -> None:
        if self._store is None or self._notice is not None:
            return
        try:
            if self._store.check([self._name]):
                first = json.loads(self._store.get(self._name).decode())
                if first["rank"] != rank():
                    self._hear(first)
        except (RuntimeError, ValueError):  # the store is gone: the main thread's collective fails by itself
            self._store = None

    def _stop(self, sentence: str, again: bool, *, hangs: bool = False) -> None:
        """Tell the other ranks, and end this process."""
        if self._store is not None:
            self._tell({"rank": rank(), "sentence": sentence, "remedy": "", "again": again, "hangs": hangs})
        self._leave(sentence, again)

    def _leave(self, sentence: str, again: bool) -> None:
        line = f"rank {rank()} of {world()}: {sentence}"
        try:
            line += self._dump(line)
            self.failed(line, again)
        except OSError as error:  # a full disk must not keep the process alive
            line += f" ({error})"
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    def _dump(self, line: str) -> str:
        if self.folder is None:
            return ""
        path = self.folder / f"stacks-rank-{rank()}.txt"
        with path.open("w") as file:
            file.write(f"{line}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return f"; stacks of its threads are in {path}"

    def _catch_bus_errors(self) -> None:
        # a handler of the signal module would only run once the faulting instruction has succeeded, which it never does
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        self._handler = kind(self._bus_error)
        libc = ctypes.CDLL(None)
        libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, kind]
        libc.signal(int(signal.SIGBUS), self._handler)

    def _bus_error(self, number: int) -> None:
        try:
            found = self.damage() if self.damage else ""
        except Exception:
            found = traceback.format_exc(limit=1)
        self._stop(found or f"bus error: a mapped file was cut short while it was read, {self._place}", not found)


__all__ = ["Watch"]
