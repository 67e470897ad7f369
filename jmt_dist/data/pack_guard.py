"""What packing refuses: a foreign folder, one in the dataset, other options or files, too little space, a second packing at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jmt_dist.affwild2.layout import Unit
from jmt_dist.config import PackOptions
from jmt_dist.data.estimate import Estimate
from jmt_dist.data.pack_shard import ShardResult
from jmt_dist.data.sample import LONGEST_NAME, escape
from jmt_dist.data.shards import MANIFEST, Manifest, PackedUnit, read_manifest
from jmt_dist.errors import UserError

WORK, PLAN = ".work", "plan.json"
RESERVE = 1.05  # of the estimate must be free


def decisive(options: PackOptions) -> dict[str, Any]:
    """The options that decide what bytes the shards have."""
    return {"audio": options.audio, "samples_per_shard": options.samples_per_shard, "seed": options.seed}


def refuse_foreign(out: Path, source: Path) -> None:
    """Raises UserError where `out` is a file, lies in the dataset, or holds something that packing did not make."""
    if source.resolve() in out.resolve().parents and not (out / MANIFEST).is_file():
        raise UserError(f"{out} lies in the dataset {source}, which stays as it was shipped", "Choose an out= beside it.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder", "Choose another out=.")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file() and not (out / WORK).is_dir():
        raise UserError(f"{out} holds files that are not shards", "Choose a new or empty folder as out=.")


def nameless(units: Sequence[Unit]) -> dict[str, str]:
    """Units whose name cannot be a key, with the reason. Raises UserError for a test unit: none of them may be left out."""
    found = {}
    for unit in units:
        try:
            unit.name.encode()
        except UnicodeEncodeError:
            found[unit.name] = "its name is not UTF-8: rename its files"
            continue
        if len(escape(unit.name)) > LONGEST_NAME:
            found[unit.name] = f"its name is too long for a tar: rename it to at most {LONGEST_NAME} letters and digits"
    for unit in units:
        if unit.split == "test" and unit.name in found:
            raise UserError(f"test unit {unit.name} cannot be packed: {found[unit.name]}", "Rename it, also in the list and sample file.")
    return found


def finished_manifest(out: Path, options: PackOptions, source: str, packed_from: str | None) -> Manifest | None:
    """The manifest in `out`, None where packing has not finished. Raises UserError: packed with other options or from elsewhere."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out)
    wanted = decisive(options)
    for name, value in wanted.items():
        if manifest.options.get(name) != value:
            there = manifest.options.get(name)
            raise UserError(f"{out} was packed with {name}={there}, not {name}={value}", f"Give {name}={there}, or choose another out=.")
    if packed_from is not None and packed_from != source:
        raise UserError(f"{out} was packed from {packed_from}, not from {source}", f"Give source={packed_from}, or choose another out=.")
    return manifest


def is_whole(manifest: Manifest) -> bool:
    """Whether every shard has its size and its index."""
    try:
        sizes = [(manifest.folder / shard.name).stat().st_size for shard in manifest.shards]
    except OSError:
        return False
    return sizes == [s.bytes for s in manifest.shards] and all((manifest.folder / s.index).is_file() for s in manifest.shards)


def require_same(manifest: Manifest, made: Sequence[ShardResult]) -> None:
    """Raises UserError where a shard that was lost and made again is not the one of the manifest; it is removed again."""
    known = {shard.name: shard.sha256 for shard in manifest.shards}
    other = [shard.name for shard in made if known.get(shard.name) != shard.sha256]
    for name in other:
        (manifest.folder / name).unlink(missing_ok=True)
    if other:
        (manifest.folder / WORK / PLAN).unlink(missing_ok=True)  # it tells of files whose shards are gone: the files of then may come back
        raise UserError(
            f"{manifest.folder / other[0]}, made again, is not what it was: the dataset or a library has changed since",
            f"Put the dataset back as it was, or remove {manifest.folder} and pack anew.",
        )


def require_space(out: Path, expected: Estimate) -> None:
    """Raises UserError where the disk has less than the estimate; what an earlier run left in `out` counts as there."""
    there = sum(path.stat().st_size for path in [*out.glob("*.tar"), *out.glob(f"{WORK}/videos/*/pcm.npy")])
    free = shutil.disk_usage(out).free + there
    need = int(RESERVE * (expected.bytes + expected.work))
    if free < need:
        raise UserError(
            f"{out} has {free / 1e9:.1f} GB free, packing needs about {need / 1e9:.1f} GB",
            "Free some space, choose another out=, or give audio=flac.",
        )


def keep_plan(out: Path, options: PackOptions, packed: Sequence[PackedUnit], digest: str, manifest: Manifest | None, started: bool) -> None:
    """Write down what the shards are made of: options, and all that pass 1 found, by its `digest`.

    Raises UserError where there are `started` shards made of something else.
    """
    plan = {"options": decisive(options), "content": digest}
    path = out / WORK / PLAN
    if started and path.is_file() and json.loads(path.read_text(encoding="utf-8")) != plan:
        raise UserError(
            f"{out} is half packed with other options or from other files than {options.source} holds now",
            f"Give the options of then, or remove {out}, or choose another out=.",
        )
    if manifest is not None and manifest.units != tuple(packed):
        raise UserError(f"{out} was packed from other units than {options.source} holds now", f"Remove {out}, or choose another out=.")
    partial = path.with_name(f"{PLAN}.{socket.gethostname()}.{os.getpid()}")  # jobs of one packing may write it side by side
    partial.write_text(json.dumps(plan), encoding="utf-8")
    partial.replace(path)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns what a disk refuses (no space, read-only, no permission, gone) into one sentence."""
    try:
        yield
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else str(out)
        full = error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # None: NumPy, which says only how much was written
        remedy = "Free some space" if full else "Check the folder, its permissions and whether its file system is mounted writable"
        raise UserError(f"{place}: {error.strerror or error}", f"{remedy}; the same command goes on where it stopped.") from None


@contextmanager
def locked(out: Path, shared: bool = False) -> Iterator[None]:
    """Hold `out` against a second packing (`shared`: jobs of one packing beside each other). Raises UserError where one is at work."""
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(handle)
            raise UserError(f"{out} is being packed by another process", "Wait for it, or choose another out=.") from None
        # a file system without locks: nothing to hold, and no reason to stop
    try:
        yield
    finally:
        os.close(handle)
