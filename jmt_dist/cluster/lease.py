"""One job at a time works in a fold's folder, and whoever watches sees that it lives.

A scheduler may start a job again while its first processes still run: a node that has lost the controller goes on computing. So
rank 0 holds `<fold>/lease.json` and renews it every few seconds. A job that finds a living owner waits. It takes over where the
owner is dead (same machine), or where the lease has not been renewed for LEASE_SECONDS by the waiter's own clock: clocks of two
machines need not agree. An owner that finds its lease taken ends at once, without saving: the folder is no longer its own.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from jmt_dist.cluster.status import now, read_json, write_json

FILE = "lease.json"
BEAT_SECONDS = 5.0
LEASE_SECONDS = 60.0
SAME = 1.0  # seconds: two readings of one process's start differ by less


class Lease:
    """Context manager: holds the lease of a folder from the moment it is free.

    `waiting(who)` is called once where another owner is at work, and `stopped()` is asked while waiting: an exception it raises ends
    the wait. Errors: OSError where the folder cannot be written or locked.
    """

    def __init__(
        self,
        folder: Path,
        owner: str,
        waiting: Callable[[str], None] = lambda who: None,
        stopped: Callable[[], None] = lambda: None,
        beat: float = BEAT_SECONDS,
        lease: float = LEASE_SECONDS,
    ) -> None:
        self.folder, self.path, self.owner = folder, folder / FILE, owner
        self.token, self.beats = secrets.token_hex(8), 0
        self._waiting, self._stopped, self._beat, self._lease = waiting, stopped, beat, lease
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self.folder.mkdir(parents=True, exist_ok=True)
        seen, since, said = ("", -1), time.monotonic(), False
        while True:
            with self._alone():
                record = read_json(self.path)
                found = (str(record.get("token", "")), int(record.get("beats", 0)))
                if found != seen:
                    seen, since = found, time.monotonic()
                if not record or is_dead(record) or time.monotonic() - since > self._lease:
                    self._write()
                    break
            if not said:
                said = True
                self._waiting(f"{record.get('owner', '?')} on {record.get('host', '?')}")
            self._stopped()
            time.sleep(min(1.0, self._beat))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        try:
            with self._alone():
                if self._is_mine():
                    self.path.unlink()
        except (OSError, ValueError):
            return  # the next one waits until it has run out

    def _renew(self) -> None:
        while not self._end.wait(self._beat):
            try:
                with self._alone():
                    mine = self._is_mine()
                    if mine:
                        self._write()
            except (OSError, ValueError):  # a full disk or a file system that is away: once it answers again the token tells
                continue
            if not mine:
                self._lost()

    def _lost(self) -> None:
        record = read_json(self.path)
        who = f"{record.get('owner', '?')} on {record.get('host', '?')}"
        print(f"{self.folder}: {who} has taken over while this job was not heard of; ending", file=sys.stderr, flush=True)
        os._exit(1)

    def _is_mine(self) -> bool:
        record = json.loads(self.path.read_text(encoding="utf-8"))  # what cannot be read tells nothing: no takeover
        return bool(record.get("token") == self.token)

    def _write(self) -> None:
        self.beats += 1
        process = {"pid": os.getpid(), "created": psutil.Process().create_time(), "machine": _machine()}
        record = {"owner": self.owner, "host": socket.gethostname(), **process, "token": self.token, "beats": self.beats, "time": now()}
        write_json(self.path, record)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Looking and writing are one step: two waiters must not both take over. The lock is held for a moment only."""
        with (self.folder / f".{FILE}.lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not self._thread.is_alive():  # not yet ours: a wait that can be ended
                        self._stopped()
                    time.sleep(0.01)
            yield


def is_running(process: dict[str, Any]) -> bool:
    """Whether the process that {"pid", "created"} names still exists: a process that got its id later is not it."""
    try:
        found = psutil.Process(int(process["pid"]))
        return abs(found.create_time() - float(process["created"])) < SAME and found.status() != psutil.STATUS_ZOMBIE
    except (KeyError, psutil.Error):
        return False


def is_dead(record: dict[str, Any]) -> bool:
    """Whether the owner is known to be gone: its process was of this very machine (and container) and is no more."""
    return record.get("machine") == _machine() and not is_running(record)


def _machine() -> str:
    """This boot of this kernel and this space of process ids: containers on one machine, or two named alike, are told apart."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {secrets.token_hex(8)}"  # nothing is known: only time can tell
