"""Label files: one header line, then `valence,arousal` per source frame; row i belongs to frame i (from 1).

The files come from several releases and hands, so they are read tolerantly, but only where there is a
rule: a byte-order mark, CRLF, no header, swapped columns named by the header, blank lines at the end.
Anything else is an error that names file and line.
"""

from __future__ import annotations

import codecs
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jmt_dist.errors import UserError

INVALID = -5.0  # how the dataset marks a frame without a usable annotation
HEADER = "valence,arousal"


@dataclass(frozen=True, eq=False)
class LabelTable:
    """A unit's labels, and what was found on the way.

    `va` is float32 [N, 2], (valence, arousal), NaN in both columns where a row has no usable label.
    The three counts are of rows, and no row is counted twice.
    """

    va: NDArray[np.float32]
    invalid: int  # rows with -5 in either column
    nan: int  # rows that say NaN
    out_of_range: int  # rows outside [-1, 1]
    had_header: bool
    crlf: bool  # lines end as on Windows

    @property
    def valid(self) -> int:
        """Rows with a label."""
        return len(self.va) - self.invalid - self.nan - self.out_of_range


def read_labels(path: Path) -> NDArray[np.float32]:
    """Labels of a file, float32 [N, 2], NaN where a frame has none. Raises as `read_table`."""
    return read_table(path).va


def read_table(path: Path) -> LabelTable:
    """Labels of a file with counts of the rows that carry none.

    Raises UserError, naming file and line, where a row is not two numbers, and where the file cannot be read.
    """
    text = read_text(path)
    lines, columns, first = _rows(text)
    values = _parse(path, lines, first)
    va = values[:, columns].astype(np.float32)
    invalid = (values == INVALID).any(axis=1)
    nan = np.isnan(values).any(axis=1) & ~invalid
    # checked after rounding: resampled releases hold numbers such as 1.0000000000000002
    out = (np.abs(va) > 1).any(axis=1) & ~invalid & ~nan
    va[invalid | nan | out] = np.nan
    return LabelTable(va, int(invalid.sum()), int(nan.sum()), int(out.sum()), first > 1, "\r\n" in text)


def count_rows(path: Path) -> int:
    """N, the number of label rows of a file, without reading the numbers. Raises UserError where it cannot be read."""
    return len(_rows(read_text(path))[0])


def write_labels(path: Path, va: NDArray[np.float32]) -> None:
    """Write labels float32 [N, 2] as the dataset does, NaN rows as `-5,-5`; appears by one rename.

    Numbers are the shortest decimals that read back as the same float32.
    """
    if va.ndim != 2 or va.shape[1] != 2:
        raise ValueError(f"labels have shape {va.shape}, not [N, 2]")
    rows = [HEADER]
    for valence, arousal in va.astype(np.float32):
        if np.isnan(valence) or np.isnan(arousal):
            rows.append("-5,-5")
        else:
            rows.append(f"{_shortest(valence)},{_shortest(arousal)}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("\n".join(rows) + "\n", encoding="utf-8")
    partial.replace(path)


def _shortest(value: np.float32) -> str:
    return np.format_float_positional(value, unique=True, trim="-")


def read_text(path: Path) -> str:
    """A dataset's text file: UTF-8 or, where its byte-order mark says so, UTF-16. Raises UserError where it is neither."""
    try:
        data = path.read_bytes()
        encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        return data.decode(encoding)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "Check the dataset folder and its permissions.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file", "Copy it again from the dataset as shipped.") from None


def _rows(text: str) -> tuple[list[str], list[int], int]:
    """Data lines of a file's text, the places of (valence, arousal) in them, and the number of the first one."""
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    names = [name.strip().strip('"').lower() for name in lines[0].split(",")] if lines else []
    if sorted(names) == ["arousal", "valence"]:
        return lines[1:], [names.index("valence"), names.index("arousal")], 2
    return lines, [0, 1], 1


def _parse(path: Path, lines: list[str], first: int) -> NDArray[np.float64]:
    values = np.empty((len(lines), 2), np.float64)
    for i, line in enumerate(lines):
        try:
            left, right = line.split(",")
            values[i] = float(left), float(right)
        except ValueError:
            shown = line.strip()[:40]
            raise UserError(
                f"line {first + i} of {path} is not `valence,arousal` but `{shown}`", "Copy the file again from the dataset as shipped."
            ) from None
    return values
