"""A packed sample held against the files it came from: its strip taken apart, its labels read anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jmt_dist.affwild2.labels import read_labels
from jmt_dist.affwild2.layout import Unit
from jmt_dist.data.geometry import strip_frames
from jmt_dist.data.huffman import transcode
from jmt_dist.data.jpeg import StripError, parse
from jmt_dist.data.report import printable, read_report
from jmt_dist.data.sample import Sample, labels_of
from jmt_dist.data.shards import REPORT, Manifest
from jmt_dist.data.strip import decode, fit, split
from jmt_dist.errors import UserError

LOWEST_PSNR = 40.0  # dB over the frames of a re-encoded strip


def compare_units(manifest: Manifest, source: Mapping[str, Unit], place: str) -> Iterator[str]:
    """What differs between the units packed and those of the dataset at `place`, of which some were left out as the report tells."""
    report = read_report(manifest.folder)
    packed = {unit.name: unit for unit in manifest.units}
    for name in sorted(packed.keys() - source.keys()):
        yield f"unit {name} is not in {place}"
    for name in sorted(source.keys() - packed.keys() - (report.omitted.keys() if report else source.keys())):
        yield f"unit {printable(name)} of {place} is neither packed nor in {REPORT}"
    for name in sorted(packed.keys() & source.keys()):
        rows = source[name].rows
        if rows and rows != packed[name].rows:
            yield f"unit {name} has {rows} rows in {place}, not {packed[name].rows}"


def compare_sample(sample: Sample, unit: Unit, rows: int) -> Iterator[str]:
    """What differs between a sample of `unit` (N = `rows`) and the unit's files.

    Mode 0: tables and entropy-coded bytes are equal. Mode 1: size, sampling, quantisation and coefficients are, by the same bytes
    after re-spelling the source's and, independently of our code, by the pixels of both.
    Mode 2: the peak signal-to-noise ratio is above 40 dB.
    """
    m, p, mode = (int(value) for value in sample.id[1:])
    if unit.labels is not None:
        try:
            wanted = labels_of(_labels(unit.labels), m, p)
        except UserError as error:
            yield error.sentence
        else:
            if not np.array_equal(sample.va, wanted, equal_nan=True):
                yield "labels differ from the label file"
    errors: list[NDArray[np.float64]] = []
    for k, (frame, stored) in enumerate(zip(strip_frames(m, p).tolist(), split(sample.strip), strict=True)):
        source = _crop(unit, frame) if 1 <= frame <= rows else None
        name = f"frame {frame} (strip frame {k})"
        if not sample.present[k]:
            if source is not None and _decodable(source):
                yield f"{name} has a crop but is black"
        elif source is None:
            yield f"{name} has no crop but is present"
        elif mode == 2:
            errors.append(_squares(stored, source))
        else:
            yield from _compare_frame(stored, source, mode, name)
    noise = float(np.mean(errors)) if errors else 0.0
    if noise and 10 * np.log10(255**2 / noise) <= LOWEST_PSNR:
        yield f"re-encoded strip is only {10 * np.log10(255**2 / noise):.1f} dB from its sources"


def _compare_frame(stored: bytes, source: bytes, mode: int, name: str) -> Iterator[str]:
    try:
        ours, theirs = parse(stored)[0], parse(source)[0]
        if (mode == 0 and ours.header != theirs.header) or not ours.header.same_coefficients(theirs.header):
            yield f"{name}: tables differ from the source's"
        elif mode == 0 and ours.entropy != theirs.entropy:
            yield f"{name}: entropy-coded bytes differ from the source's"
        elif mode == 1 and not np.array_equal(np.asarray(decode(stored)), np.asarray(decode(source))):
            yield f"{name}: decoded pixels differ from the source's"
        elif mode == 1 and ours.entropy != transcode(theirs):  # rounding hides small differences, black and white large ones
            yield f"{name}: coefficients differ from the source's"
    except StripError as error:
        yield f"{name}: the source cannot be of mode {mode}: {error}"


def _squares(stored: bytes, source: bytes) -> NDArray[np.float64]:
    one, other = (np.asarray(fit(decode(data)), np.float64) for data in (stored, source))
    return np.square(one - other)


def _decodable(source: bytes) -> bool:
    try:
        decode(source)
    except StripError:
        return False
    return True


def _crop(unit: Unit, frame: int) -> bytes | None:
    for folder in unit.crops:
        path = folder / f"{frame:05d}.jpg"
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return b""  # there, but no decoder would take it
    return None


@lru_cache(maxsize=1024)
def _labels(path: Path) -> NDArray[np.float32]:
    return read_labels(path)
