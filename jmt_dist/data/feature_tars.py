"""Features on disk: tars of equal records, each with a digest of its bytes in its name, and a list of them (DESIGN section 6).

Members of a sample: visual.f16 and audio.f16 [O, 8, 512] (.f32 where features.dtype says so), va.f32 [64, 2], id.i32 [4]; O offsets
are stored, 8 in a full set. All samples of a folder have members of the same sizes, so that a tar is an array of equal records:
it is mapped into memory, and ranks of one node share what the kernel has read of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jmt_dist.data.geometry import CLIPS, SUBSEQUENCE
from jmt_dist.data.shards import Shard, damage_of
from jmt_dist.data.tars import BLOCK, RECORD, ShardWriter
from jmt_dist.errors import UserError

WIDTH = 512
DESCRIPTION = "features.json"
VERSION, WITHOUT_DIGESTS = 3, 2  # of the folder's layout
DIGITS = 16  # of the SHA-256 of a tar that its name holds: one rename publishes both
AGAIN = "Run the features stage of this fold again: only samples that are not stored whole are computed."

FeatureType = Literal["float16", "float32"]
_SUFFIX: dict[FeatureType, str] = {"float16": "f16", "float32": "f32"}
_NAME = re.compile(rf".+-([0-9a-f]{{{DIGITS}}})\.tar")


class FeatureWriter:
    """Writes samples to `<folder>/<part>-<name>-<digest>.tar`, published by one rename by `close`.

    `name` is the writer's own among all ranks and starts.
    """

    def __init__(self, folder: Path, part: str, name: str, dtype: FeatureType = "float16") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.dtype, self.count = dtype, 0
        self._temporary = folder / f"{part}-{name}.tar.tmp"
        self._tar = ShardWriter(self._temporary)

    def add(self, ident: NDArray[Any], visual: Tensor, audio: Tensor, labels: NDArray[Any]) -> None:
        """One sample: ident [4], visual and audio [O, 8, 512], labels [64, 2] of its end frames n = q + 8 j (NaN = none).

        Raises UserError where a feature is not a finite number, or too large for float16.
        """
        suffix = _SUFFIX[self.dtype]
        members = {
            f"visual.{suffix}": self._stored(visual, "visual", ident),
            f"audio.{suffix}": self._stored(audio, "audio", ident),
            "va.f32": labels.astype("<f4"),
            "id.i32": ident.astype("<i4"),
        }
        self._tar.add(_key(ident), ((name, np.ascontiguousarray(values).tobytes()) for name, values in members.items()))
        self.count += 1

    def _stored(self, values: Tensor, stream: str, ident: NDArray[Any]) -> NDArray[Any]:
        stored: NDArray[Any] = values.to(getattr(torch, self.dtype)).cpu().numpy()
        if np.isfinite(stored).all():
            return stored
        if bool(values.isfinite().all()):
            raise UserError(f"a {stream} feature of sample {_key(ident)} is too large for float16", "Take features.dtype=float32.")
        raise UserError(f"the {stream} backbone gives NaN or Inf for sample {_key(ident)}", f"Train the {stream} stage anew, more gently.")

    def close(self) -> None:
        """Finish the tar and give it its final name; one without samples leaves nothing."""
        self._tar.close()
        if self.count:
            name = self._temporary.name.removesuffix(".tar.tmp")
            os.replace(self._temporary, self._temporary.with_name(f"{name}-{self._tar.sha256[:DIGITS]}.tar"))
        else:
            self._temporary.unlink()


def _key(ident: NDArray[Any]) -> str:
    unit, m, p = (int(value) for value in ident[:3])
    return f"{unit:05d}-{m:04d}-{p}"


@dataclass(frozen=True)
class Description:
    """What a finished folder holds; `tars` is empty where it was written before tars had digests (`checkable` is False)."""

    offsets: tuple[int, ...]
    dtype: FeatureType
    tars: tuple[Shard, ...]
    checkable: bool

    def of(self, folder: Path, part: str) -> list[Path]:
        """The tars of a part."""
        if not self.checkable:
            return sorted(folder.glob(f"{part}-*.tar"))
        return [folder / tar.name for tar in self.tars if tar.name.startswith(f"{part}-")]


def write_description(folder: Path, offsets: Sequence[int], dtype: FeatureType = "float16") -> None:
    """List the tars of a folder, and what they hold; written last, by one rank, when all tars are there."""
    for left in folder.glob("*.tar.tmp"):  # of starts that were killed
        left.unlink()
    tars = []
    for path in sorted(folder.glob("*.tar")):
        samples = len(records(path, len(offsets), dtype, mmap=True))
        tars.append(asdict(Shard(path.name, samples, path.stat().st_size, _digest_of(path))))
    values: dict[str, Any] = {"version": VERSION, "offsets": list(offsets), "dtype": dtype, "width": WIDTH, "tars": tars}
    temporary = folder / f"{DESCRIPTION}.tmp"
    temporary.write_text(json.dumps({**values, "digest": _own_digest(values)}, indent=1))
    os.replace(temporary, folder / DESCRIPTION)


def read_description(folder: Path) -> Description:
    """What a finished folder holds. Raises UserError where it is missing, damaged or of another version."""
    path = folder / DESCRIPTION
    try:
        values = json.loads(path.read_text())
        version, whole = values["version"], values.pop("digest", None) == _own_digest(values)
        tars = tuple(Shard(**tar) for tar in values.get("tars", ()))
        found = Description(tuple(values["offsets"]), values.get("dtype", "float16"), tars, version == VERSION)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no finished features", "Run the features stage of this fold first.") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: it is no description of features", AGAIN) from None
    if version not in (VERSION, WITHOUT_DIGESTS):
        raise UserError(f"{folder} was written by another version of this program", f"Remove {folder}; then run the features stage again.")
    if found.checkable and not whole:
        raise UserError(f"{path} is damaged: its bytes are not those that were stored", AGAIN)
    return found


def _own_digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digest_of(path: Path) -> str:
    """The digest that a tar's name holds; empty where it holds none."""
    found = _NAME.fullmatch(path.name)
    return found[1] if found else ""


def feature_damage(folder: Path, parts: Iterable[str], between: Callable[[], None] = lambda: None) -> str:
    """A sentence that names the first file of some parts that is not as it was stored; empty where all are.

    Reads every byte: a second per GB. `between` is called after each tar, and may raise to end the reading.
    """
    wanted = tuple(f"{part}-" for part in parts)
    try:
        tars = [tar for tar in read_description(folder).tars if tar.name.startswith(wanted)]
    except UserError as error:
        return error.sentence
    for reads in (False, True):  # sizes first: they are known at once
        for tar in tars:
            found = damage_of(folder / tar.name, tar, reads, "stored")
            if found:
                return f"{folder / tar.name} {found}"
            between()
    return ""


def stored_samples(folder: Path, part: str, offsets: int, dtype: FeatureType, between: Callable[[], None] = lambda: None) -> Tensor:
    """The samples [K, 3] (unit, segment, phase) of a part that an unfinished folder holds, each once; damaged tars are removed.

    Reads every byte; `between` is called after each tar.
    """
    found = [torch.empty(0, 3, dtype=torch.int32)]
    for path in sorted(folder.glob(f"{part}-*.tar")):
        try:
            rows = torch.from_numpy(records(path, offsets, dtype, mmap=True)["id"][:, :3].copy())
            digest = _digest_of(path)
            if not digest:
                raise UserError(f"{path} has no digest in its name, so that it cannot be checked", AGAIN)
            damaged = damage_of(path, Shard(path.name, len(rows), path.stat().st_size, digest), True, "stored")
            if damaged:
                raise UserError(f"{path} {damaged}", AGAIN)
            found.append(rows)
        except UserError as error:
            print(f"{error.sentence}: its samples are computed again", flush=True)
            path.unlink()
        between()
    return torch.cat(found).unique(dim=0)


def records(path: Path, offsets: int, dtype: FeatureType, mmap: bool) -> NDArray[Any]:
    """A tar of features as an array of records with fields visual, audio, va and id.

    Raises UserError where it is missing, or its size or its names are not those of whole samples.
    """
    suffix = _SUFFIX[dtype]
    fields: list[Any] = []
    for member, kind, shape in (
        ("visual", f"<{suffix[0]}{int(suffix[1:]) // 8}", (offsets, CLIPS, WIDTH)),
        ("audio", f"<{suffix[0]}{int(suffix[1:]) // 8}", (offsets, CLIPS, WIDTH)),
        ("va", "<f4", (SUBSEQUENCE, 2)),
        ("id", "<i4", (4,)),
    ):
        filling = -(np.dtype(kind).itemsize * int(np.prod(shape))) % BLOCK
        fields += [(f"{member}-name", "S100"), (f"{member}-header", f"V{BLOCK - 100}"), (member, kind, shape)]
        fields += [(f"{member}-filling", f"V{filling}")] * (filling > 0)
    record = np.dtype(fields)
    try:
        size = path.stat().st_size
    except OSError as error:
        how = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {how}", AGAIN) from None
    count = size // record.itemsize
    whole = -(-(count * record.itemsize + 2 * BLOCK) // RECORD) * RECORD
    if count and size == whole:
        found: NDArray[Any] = np.memmap(path, record, "r", shape=(count,)) if mmap else np.fromfile(path, record, count)
        names = [
            found[f"{member}-name"][place].decode("ascii", "replace") for place in (0, -1) for member in ("visual", "audio", "va", "id")
        ]
        keys = [_key(found["id"][place]) for place in (0, -1)]
        if names == [f"{key}.{name}" for key in keys for name in (f"visual.{suffix}", f"audio.{suffix}", "va.f32", "id.i32")]:
            return found
    raise UserError(f"{path} is damaged: it does not hold whole samples", AGAIN)
