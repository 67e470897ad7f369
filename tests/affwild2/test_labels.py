"""Label files, clean and as found in the wild."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jmt_dist.affwild2.labels import count_rows, read_labels, read_table, write_labels
from jmt_dist.errors import UserError

CLEAN = np.array([[0.5, -0.25], [0.0, 1.0], [-1.0, 0.125]], np.float32)
ROWS = b"0.5,-0.25\n0,1\n-1,0.125\n"


def file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "unit.txt"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"valence,arousal\n" + ROWS,
        b"valence,arousal\n" + ROWS.removesuffix(b"\n"),
        (b"valence,arousal\n" + ROWS).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbfvalence,arousal\n" + ROWS,
        ("valence,arousal\n" + ROWS.decode()).encode("utf-16"),
        b"Valence, Arousal\n" + ROWS.replace(b",", b" , "),
        b"valence,arousal\n" + ROWS + b"\n \n\r\n",
        b"arousal,valence\n-0.25,0.5\n1,0\n0.125,-1\n",
        b"valence,arousal\n5e-1,-.25\n0.,1.0000\n-1.000000000000000,0.125\n",
    ],
)
def test_tolerated_spellings(tmp_path: Path, data: bytes) -> None:
    table = read_table(file(tmp_path, data))
    assert table.va.dtype == np.float32
    np.testing.assert_array_equal(table.va, CLEAN)
    assert (table.invalid, table.nan, table.out_of_range, table.had_header, table.valid) == (0, 0, 0, True, 3)
    assert count_rows(tmp_path / "unit.txt") == 3


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_missing_header_costs_no_row(tmp_path: Path, start: bytes) -> None:
    table = read_table(file(tmp_path, start + ROWS))
    np.testing.assert_array_equal(table.va, CLEAN)
    assert not table.had_header
    assert count_rows(tmp_path / "unit.txt") == 3


def test_rows_without_a_label(tmp_path: Path) -> None:
    rows = ["0.1,0.2", "-5,-5", "-5.0,0.3", "0.3,-5.000", "nan,0.1", "0.1,NaN", "-5,nan", "1.5,0", "0,-1.01", "inf,0", "0.4,0.5"]
    table = read_table(file(tmp_path, "\n".join(["valence,arousal", *rows]).encode()))
    assert (table.invalid, table.nan, table.out_of_range, table.valid) == (4, 2, 3, 2)
    expected = np.full((11, 2), np.nan, np.float32)
    expected[0], expected[-1] = (0.1, 0.2), (0.4, 0.5)
    np.testing.assert_array_equal(table.va, expected)
    np.testing.assert_array_equal(read_labels(tmp_path / "unit.txt"), expected)


def test_rounding_does_not_put_a_label_out_of_range(tmp_path: Path) -> None:
    table = read_table(file(tmp_path, b"1.0000000000000002,-1.00000000000001\n1.001,0\n"))
    assert table.out_of_range == 1
    np.testing.assert_array_equal(table.va[0], np.float32([1, -1]))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"valence,arousal\n0.1,0.2\n0.1\n", 3),
        (b"valence,arousal\n0.1,0.2,0.3\n", 2),
        (b"0.1,0.2\n0.1;0.2\n", 2),
        (b"valence,arousal\n0.1,0.2\n\n0.3,0.4\n", 3),  # a blank line between rows: which frame is the next row?
        (b"valence,arousal\n0.1,\n", 2),
        (b"left,right\n0.1,0.2\n", 1),
        (b"valence,arousal\n0.1,0.2\nvalence,arousal\n", 3),
    ],
)
def test_unparsable_lines_are_named(tmp_path: Path, data: bytes, line: int) -> None:
    path = file(tmp_path, data)
    with pytest.raises(UserError, match=f"line {line} of {path}") as error:
        read_table(path)
    assert error.value.remedy


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a text file"):
        read_table(file(tmp_path, b"\xff\xd8\xff\xe0\x00\x10JFIF"))
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path / "absent.txt")


@pytest.mark.parametrize("data", [b"", b"valence,arousal\n", b"\n\n"])
def test_no_rows(tmp_path: Path, data: bytes) -> None:
    assert read_table(file(tmp_path, data)).va.shape == (0, 2)
    assert count_rows(tmp_path / "unit.txt") == 0


@given(
    va=hnp.arrays(np.float32, st.tuples(st.integers(0, 20), st.just(2)), elements=st.floats(-1, 1, width=32) | st.just(np.float32(np.nan)))
)
def test_written_labels_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, va: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("labels") / "unit.txt"
    write_labels(path, va)
    expected = va.copy()
    expected[np.isnan(va).any(axis=1)] = np.nan
    np.testing.assert_array_equal(read_labels(path), expected)
    lines = path.read_text().splitlines()
    assert lines[0] == "valence,arousal"
    assert [line == "-5,-5" for line in lines[1:]] == np.isnan(va).any(axis=1).tolist()
    assert [p.name for p in path.parent.iterdir()] == ["unit.txt"]


def test_written_shape_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        write_labels(tmp_path / "unit.txt", np.zeros((3, 3), np.float32))
