"""What keeps a store from taking records for a while: a SQLite file that others write, a full disk."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from jmt_dist.errors import UserError

T = TypeVar("T")
RESERVED = 4096  # bytes: a block of a file system


def retried(call: Callable[[], T], tries: int = 6) -> T:
    """SQLite answers `database is locked` to a writer that waits too long behind others: try again."""
    for attempt in range(tries):
        try:
            return call()
        except Exception as error:
            if "database is locked" not in str(error) or attempt == tries - 1:
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


class Patient:
    """An MlflowClient each of whose calls is `retried`."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._client, name)
        return lambda *args, **kind: retried(lambda: call(*args, **kind))


def is_full(error: BaseException) -> bool:
    """Whether a disk is full: the run folder's, or that of a SQLite file."""
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "database or disk is full" in str(error)


@contextmanager
def reserved(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Room for a small JSON file, taken before what it is to name is made: a full disk must not leave a run that no file knows.

    Yields what writes the values and lets the file appear by one rename. Raises UserError where there is no room.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "wb", buffering=0) as file:

            def fill(values: Mapping[str, Any]) -> None:
                os.pwrite(file.fileno(), json.dumps(values, indent=1).encode().ljust(RESERVED - 1) + b"\n", 0)
                os.replace(scratch, path)

            if file.write(b" " * RESERVED) < RESERVED:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
            yield fill
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}", "Free some space, or look who may write there.") from error
    finally:
        scratch.unlink(missing_ok=True)
