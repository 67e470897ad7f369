"""USTAR shards and DALI's index of them (v1.2), written in one pass and read back."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

BLOCK, RECORD = 512, 10_240  # of tar: members are padded to blocks, the file to records
VERSION = "v1.2"


@dataclass(frozen=True)
class Entry:
    """One sample of a tar: its key and (extension, offset of the bytes, size) of its members, in order."""

    key: str
    members: tuple[tuple[str, int, int], ...]

    def line(self) -> str:
        """The sample's line of the index: `extension offset size name` for each member."""
        return " ".join(f"{extension} {offset} {size} {self.key}.{extension}" for extension, offset, size in self.members)


def index_text(entries: Sequence[Entry]) -> str:
    """The index of a tar, or of some of its samples in any order."""
    return "".join([f"{VERSION} {len(entries)}\n", *(entry.line() + "\n" for entry in entries)])


def parse_index(text: str) -> list[Entry]:
    """Entries of an index. Raises ValueError where it is none of v1.2."""
    lines = text.splitlines()
    if not lines or lines[0].split() != [VERSION, str(len(lines) - 1)]:
        raise ValueError(f"the first line is not `{VERSION} <number of samples>`")
    entries = []
    for number, line in enumerate(lines[1:], start=2):
        words = line.split(" ")
        if len(words) % 4 or not words:
            raise ValueError(f"line {number} is not a list of `extension offset size name`")
        members = tuple((words[i], int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), 4))
        key = words[3].removesuffix(f".{words[0]}")
        entry = Entry(key, members)
        if entry.line() != line:
            raise ValueError(f"line {number} names members of more than one sample")
        entries.append(entry)
    return entries


class ShardWriter:
    """Writes a tar whose bytes depend on keys and members alone: no time, owner or order of its own.

    After `close`: `entries`, `size` in bytes and `sha256` of the file.
    """

    def __init__(self, path: Path) -> None:
        self.entries: list[Entry] = []
        self.size = 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO = path.open("wb")

    def add(self, key: str, members: Iterable[tuple[str, bytes]]) -> None:
        """Append one sample. Raises ValueError where a name is too long for USTAR."""
        placed = []
        for extension, data in members:
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data), 0o644
            self._write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
            placed.append((extension, self.size, len(data)))
            self._write(data)
            self._write(bytes(-len(data) % BLOCK))
        self.entries.append(Entry(key, tuple(placed)))

    def close(self) -> None:
        """End the tar: two empty blocks, filled up to a record."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.size % RECORD))
        self._file.close()

    @property
    def sha256(self) -> str:
        """sha256 of what is written so far."""
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def scan_tar(path: Path) -> list[Entry]:
    """Entries of a tar as its own headers give them, for comparison with an index. Raises ValueError on a broken tar."""
    entries: list[tuple[str, list[tuple[str, int, int]]]] = []
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    raise ValueError(f"{member.name} is not a plain file")
                if member.offset_data - member.offset != BLOCK:
                    raise ValueError(f"{member.name} has an extended header, which USTAR does not have")
                key, _, extension = member.name.partition(".")
                if not entries or entries[-1][0] != key:
                    entries.append((key, []))
                entries[-1][1].append((extension, member.offset_data, member.size))
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"not a tar: {error}") from None
    with path.open("rb") as file:  # tarfile takes a tar that is cut inside a header for one that ends there
        file.seek(end)
        rest = file.read()
    if len(rest) < 2 * BLOCK or any(rest) or (end + len(rest)) % RECORD:
        raise ValueError("not a tar: it does not end with empty blocks")
    return [Entry(key, tuple(members)) for key, members in entries]


def read_entry(file: BinaryIO, entry: Entry) -> dict[str, bytes]:
    """Bytes of a sample's members by extension."""
    found = {}
    for extension, offset, size in entry.members:
        file.seek(offset)
        found[extension] = file.read(size)
    return found
