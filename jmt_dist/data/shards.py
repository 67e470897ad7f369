"""A shard folder as its readers see it: the manifest, and a fold as index files over the same tars.

<shards>/00000.tar 00000.idx …                       all samples, in a global random order
<shards>/manifest.json                               release, options, geometry, units, size and sha256 of every shard
<shards>/folds/<policy>-<seed>/folds.json            which unit is where
<shards>/folds/<policy>-<seed>/<fold>/<part>/*.idx   the samples of one part (train, validation); tars without any are left out
<shards>/folds/<policy>-<seed>/test/*.idx            the test units, the same for every fold
<shards>/pack-report.json, pack-report.txt           what was met and what was left out
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jmt_dist.affwild2.folds import Folds, UnitSummary, read_folds
from jmt_dist.config import FoldOptions, PackOptions
from jmt_dist.data.sample import GEOMETRY
from jmt_dist.errors import UserError

VERSION = 1
MANIFEST, REPORT, REPORT_TEXT, FOLDS, FOLDS_FILE = "manifest.json", "pack-report.json", "pack-report.txt", "folds", "folds.json"
PACK = "python shards/pack_shards.py"

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class PackedUnit:
    """A unit of the shards; its place in `Manifest.units` is its index in `id.i32`. `histogram` as in `UnitSummary`."""

    name: str
    video: str
    split: str
    rows: int
    valid: int
    histogram: tuple[int, ...]

    def summary(self) -> UnitSummary:
        """What the division into folds needs to know of it."""
        return UnitSummary(self.name, self.video, self.split, self.valid, self.histogram)


@dataclass(frozen=True)
class Shard:
    """One tar: file name, samples, bytes and sha256."""

    name: str
    samples: int
    bytes: int
    sha256: str

    @property
    def index(self) -> str:
        """File name of its index."""
        return Path(self.name).with_suffix(".idx").name


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds. `options` are those that decide the bytes: audio, samples_per_shard, seed."""

    folder: Path
    release: str
    options: dict[str, Any]
    units: tuple[PackedUnit, ...]
    shards: tuple[Shard, ...]
    geometry: dict[str, int] = field(default_factory=lambda: dict(GEOMETRY))

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def hash(self) -> str:
        """sha256 of the geometry and of the shards' sha256 in order: names the content, wherever it lies."""
        return _digest([json.dumps(self.geometry, sort_keys=True), *(shard.sha256 for shard in self.shards)])

    def to_json(self) -> str:
        """The text of manifest.json: depends on the packed content alone."""
        units = [asdict(unit) for unit in self.units]
        shards = [asdict(shard) for shard in self.shards]
        head = {"version": VERSION, "release": self.release, "options": self.options, "geometry": self.geometry}
        lines = [json.dumps(head)[1:-1], _lines("units", units), _lines("shards", shards)]
        return "{" + ",\n".join(lines) + "}\n"


def _lines(name: str, items: list[dict[str, Any]]) -> str:
    return f'"{name}": [\n' + ",\n".join(json.dumps(item) for item in items) + "\n]"


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class ShardSet:
    """The samples of one part of one fold, as DALI takes them: tars, and for each the index of the samples to use."""

    tars: tuple[Path, ...]
    indexes: tuple[Path, ...]
    samples: int
    manifest_hash: str
    index_hash: str


def read_manifest(shards: Path) -> Manifest:
    """The manifest of a shard folder. Raises UserError: no such folder, packing not finished, another version or geometry."""
    shards = Path(shards)
    if not shards.is_dir():
        raise UserError(f"there is no shard folder {shards}", f"Pack it: {pack_command(shards)}")
    path = shards / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version, geometry = data["version"], data["geometry"]
    except FileNotFoundError:
        raise UserError(f"{shards} has no {MANIFEST}", f"Pack it, or let packing finish: {pack_command(shards)}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read as a manifest", "Restore it, or pack into a new folder.") from None
    if version != VERSION:
        raise UserError(f"{path} has version {version}, not {VERSION}", "Pack again with this version, into a new folder.")
    if geometry != GEOMETRY:
        other = sorted(name for name in {*geometry, *GEOMETRY} if geometry.get(name) != GEOMETRY.get(name))
        sentence = f"{shards} was packed with another geometry ({', '.join(other)})"
        raise UserError(sentence, "Pack again with this version, into a new folder.")
    try:
        units = tuple(PackedUnit(**{**unit, "histogram": tuple(unit["histogram"])}) for unit in data["units"])
        return Manifest(shards, data["release"], data["options"], units, tuple(Shard(**shard) for shard in data["shards"]), geometry)
    except (KeyError, TypeError):
        raise UserError(f"{path} cannot be read as a manifest", "Restore it, or pack into a new folder.") from None


def open_shards(shards: Path) -> Manifest:
    """The manifest of a shard folder whose tars are all there. Raises UserError as `read_manifest`, and where a tar is missing."""
    manifest = read_manifest(shards)
    shards = manifest.folder
    missing = [shard.name for shard in manifest.shards if not (shards / shard.name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"shard {shards / missing[0]}{more} is missing", f"Pack what is missing: {pack_command(shards)}")
    return manifest


def damage_of(tar: Path, shard: Shard, reads: bool, made: str = "packed") -> str:
    """What is wrong with a tar, as the end of a sentence; empty where it is as it was `made`. With `reads` its bytes are read and compared.

    `shard.sha256` may be the digest's first digits.
    """
    try:
        size = tar.stat().st_size
        if size != shard.bytes:
            return f"has {size} bytes, not the {shard.bytes} that were {made}"
        if not reads:
            return ""
        with tar.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    same = shard.sha256 != "" and digest.startswith(shard.sha256)
    return "" if same else f"is damaged: its bytes are not those that were {made}"


def pack_command(shards: Path, folds: FoldOptions | None = None) -> str:
    """The command that completes a shard folder, with its source where the report tells it, and its options where the manifest does."""
    source, options = _told(shards / REPORT, "source"), _told(shards / MANIFEST, "options") or {}
    words = [f"{name}={value}" for name, value in options.items() if value != PackOptions.model_fields[name].default]
    words += [f"folds.policy={folds.policy}", f"folds.seed={folds.seed}"] if folds else []
    first = shlex.quote(f"source={source}") if source else "source=<dataset>"
    return " ".join([PACK, first, *map(shlex.quote, [f"out={shards}", *words])])


def _told(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fold_folder(shards: Path, folds: FoldOptions) -> Path:
    """Where the indexes of a fold policy and seed are."""
    return shards / FOLDS / f"{folds.policy}-{folds.seed}"


def open_folds(shards: Path, folds: FoldOptions) -> Folds:
    """The folds of a policy and seed. Raises UserError where they were not packed."""
    path = fold_folder(Path(shards), folds) / FOLDS_FILE
    if not path.is_file():
        there = sorted(p.parent.name for p in (Path(shards) / FOLDS).glob(f"*/{FOLDS_FILE}") if not p.parent.name.startswith("."))
        raise UserError(
            f"folds {folds.policy} with seed {folds.seed} are not in {shards} (there: {', '.join(there) or 'none'})",
            f"Add them, nothing is packed again: {pack_command(Path(shards), folds)}",
        )
    return read_folds(path)


def fold_shards(shards: Path, folds: FoldOptions, fold: str, part: Part) -> ShardSet:
    """The samples of a part of a fold; `part="test"` gives the test units, the same in every fold.

    Raises UserError as `open_shards`; also: folds not packed, no such fold (naming those there are), no sample.
    """
    manifest = open_shards(shards)
    divided = open_folds(manifest.folder, folds)
    if fold not in divided.names:
        raise UserError(f"there is no fold `{fold}` in {manifest.folder}", f"Folds are: {', '.join(divided.names)}.")
    base = fold_folder(manifest.folder, folds)
    folder = base / "test" if part == "test" else base / fold / part
    indexes = tuple(sorted(folder.glob("*.idx")))
    if not indexes:
        remedy = "The dataset has no test list." if part == "test" else "Choose another fold, or check pack-report.txt for units left out."
        raise UserError(f"the {part} part of fold `{fold}` in {manifest.folder} has no sample", remedy)
    texts = [path.read_text(encoding="ascii") for path in indexes]
    samples = sum(int(text.split("\n", 1)[0].split()[1]) for text in texts)
    index_hash = _digest(part for path, text in zip(indexes, texts, strict=True) for part in (path.name, text))
    tars = tuple(manifest.folder / path.with_suffix(".tar").name for path in indexes)
    return ShardSet(tars, indexes, samples, manifest.hash, index_hash)
