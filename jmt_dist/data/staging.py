"""Copies of a fold's tars on a disk of the node itself (`site.staging`), made once per node and verified as they are written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

from jmt_dist.data.shards import MANIFEST, Manifest, ShardSet
from jmt_dist.errors import UserError

PREFIX = "jmt-"
POLL_SECONDS = 0.2
_BLOCK = 1 << 22
_used: dict[Path, IO[bytes]] = {}  # held while this process lives: nobody else removes what it reads


def staged(shards: ShardSet, folder: Path) -> ShardSet:
    """The same samples, read from the copies in `folder`."""
    return replace(shards, tars=tuple(folder / tar.name for tar in shards.tars))


def staging_folder(staging: str, manifest: Manifest) -> Path:
    """Where the copies of a shard folder lie on this node. Raises UserError where `staging` names a variable that is not set here."""
    path = os.path.expandvars(staging)
    if "$" in path:
        raise UserError(f"site.staging={staging} names a variable that this node does not set", "Name a folder that every node has.")
    return Path(path).expanduser() / f"{PREFIX}{manifest.hash[:16]}"


def stage_in(shards: ShardSet, manifest: Manifest, folder: Path, moved: Callable[[], None] = lambda: None) -> int:
    """Copy the tars that are not there yet, for one process per node; returns the bytes copied.

    `moved` is called whenever some bytes more are there, whoever copies them; an exception that it raises ends the copying.

    Jobs that stage at once share the work: each tar is copied by whoever locks it first. A copy gets its name once its sha256 is
    the manifest's. They stay for the next job; where room is short, copies of other shard folders that no job uses are removed.
    Raises UserError where there is too little room or a copy is not what was packed.
    """
    try:
        use = _use(folder)
    except OSError as error:
        raise UserError(f"site.staging: {folder} cannot be used ({error.strerror})", "Name another folder, or leave it empty.") from None
    if folder in _used:
        use.close()
    else:
        _used[folder] = use
    known = {shard.name: shard for shard in manifest.shards}
    missing = [tar for tar in shards.tars if not (folder / tar.name).is_file()]
    _make_room(folder, sum(known[tar.name].bytes for tar in missing))
    copied = 0
    for tar in missing:
        with (folder / f".{tar.name}.lock").open("ab") as lock:
            _await(lock, folder, moved)
            if not (folder / tar.name).is_file():
                copied += _copy(tar, folder / tar.name, known[tar.name].sha256, moved)
    if not (folder / MANIFEST).is_file():
        _copy(manifest.folder / MANIFEST, folder / MANIFEST, "", moved)
    return copied


def _await(lock: IO[bytes], folder: Path, moved: Callable[[], None]) -> None:
    """Take the lock of a tar. While another job copies it, the growth of what lies in the folder is what shows that it lives."""
    seen = -1
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(FileNotFoundError):  # a copy that gets its name
                size = sum(entry.stat().st_size for entry in os.scandir(folder))
                if size != seen:
                    seen = size
                    moved()
            time.sleep(POLL_SECONDS)


def _copy(source: Path, target: Path, sha256: str, moved: Callable[[], None]) -> int:
    part = target.with_name(f".{target.name}.{os.getpid()}")
    digest, size = hashlib.sha256(), 0
    try:
        with source.open("rb") as reader, part.open("wb") as writer:
            while block := reader.read(_BLOCK):
                digest.update(block)
                writer.write(block)
                size += len(block)
                moved()
        if sha256 and digest.hexdigest() != sha256:
            raise UserError(f"{source} is not what was packed (sha256)", "Verify the shards with shards/verify_shards.py.")
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"{source} could not be copied to {target.parent} ({error.strerror})", "Leave site.staging empty.") from None
    finally:
        part.unlink(missing_ok=True)
    return size


def _use(folder: Path) -> IO[bytes]:
    """The folder's lock, held for reading: once it is held nobody removes the folder."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            use = (folder / ".use").open("ab")
        except FileNotFoundError:
            continue
        fcntl.flock(use, fcntl.LOCK_SH)
        try:
            if os.path.samestat(os.fstat(use.fileno()), (folder / ".use").stat()):
                return use
        except FileNotFoundError:
            pass  # whoever held it was removing the folder: make it again
        use.close()


def _make_room(folder: Path, needed: int) -> None:
    for other in sorted(folder.parent.glob(f"{PREFIX}*")):
        if shutil.disk_usage(folder).free >= needed:
            return
        if other == folder or not (other / ".use").is_file() or other.stat().st_uid != os.geteuid():
            continue
        with (other / ".use").open("ab") as use:
            try:
                fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # a job reads it
            shutil.rmtree(other, ignore_errors=True)
            print(f"removed {other}, which no job uses, to make room", flush=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"site.staging: {folder.parent} has {free / 2**30:.1f} GB free, and this fold's shards need {needed / 2**30:.1f} GB",
            "Make room there, or leave site.staging empty: the shards are then read where they are.",
        )
