import csv
import re
from decimal import Decimal

import numpy as np
import pytest

from jmt_dist.errors import UserError
from jmt_dist.evaluate import challenge
from jmt_dist.evaluate.challenge import HEADER, read_sample, validate, write_challenge, write_units

UNITS = {"10-60-1280x720_right": 3, "video2.v2": 2, "134": 4}


def sample(tmp_path, rows=None, header=HEADER, end="\n"):
    rows = rows or [f"{unit}/{i:05d}.jpg" for unit, n in UNITS.items() for i in range(1, n + 1)]
    path = tmp_path / "sample.txt"
    path.write_bytes(end.join([header, *(f"{row},-5,-5" for row in rows), ""]).encode())
    return path


def predictions():
    return {unit: np.arange(2 * n).reshape(n, 2) / 10 - 0.2 for unit, n in reversed(UNITS.items())}  # another order than the sample


def test_exact_rows_in_the_samples_order(tmp_path):
    path = tmp_path / "new" / "predictions.txt"
    report = write_challenge(path, sample(tmp_path), predictions(), decimals=3)
    assert path.read_bytes() == (
        b"image_location,valence,arousal\n"
        b"10-60-1280x720_right/00001.jpg,-0.200,-0.100\n"
        b"10-60-1280x720_right/00002.jpg,0.000,0.100\n"
        b"10-60-1280x720_right/00003.jpg,0.200,0.300\n"
        b"video2.v2/00001.jpg,-0.200,-0.100\n"
        b"video2.v2/00002.jpg,0.000,0.100\n"
        b"134/00001.jpg,-0.200,-0.100\n"
        b"134/00002.jpg,0.000,0.100\n"
        b"134/00003.jpg,0.200,0.300\n"
        b"134/00004.jpg,0.400,0.500\n"
    )
    assert (report.rows, report.units, report.clipped, report.unused) == (9, 3, 0, ())


def test_order_of_frames_is_the_samples_too(tmp_path):
    rows = ["134/00004.jpg", "video2.v2/00002.jpg", "134/00001.jpg"]
    write_challenge(tmp_path / "out.txt", sample(tmp_path, rows), predictions())
    lines = (tmp_path / "out.txt").read_text().splitlines()[1:]
    assert lines == [f"{rows[0]},0.400000,0.500000", f"{rows[1]},0.000000,0.100000", f"{rows[2]},-0.200000,-0.100000"]


def test_numbers_are_clipped_rounded_and_never_minus_zero(tmp_path):
    va = np.array([[1.5, -7.0], [-1e-9, 0.1234567], [0.9999999, -0.0]])
    report = write_challenge(tmp_path / "out.txt", sample(tmp_path, [f"u/{i:05d}.jpg" for i in (1, 2, 3)]), {"u": va, "extra": va})
    lines = (tmp_path / "out.txt").read_text().splitlines()[1:]
    assert [line.split(",", 1)[1] for line in lines] == ["1.000000,-1.000000", "0.000000,0.123457", "1.000000,0.000000"]
    assert report.clipped == 2 and report.unused == ("extra",)


@pytest.mark.parametrize(("header", "end"), [(HEADER, "\r\n"), ("\ufeff" + HEADER, "\n"), ("image_location, valence, arousal", "\n")])
def test_samples_of_other_editions(tmp_path, header, end):
    path = sample(tmp_path, header=header, end=end)
    assert [(unit, frame) for _, unit, frame in read_sample(path)] == [(u, i) for u, n in UNITS.items() for i in range(1, n + 1)]
    write_challenge(tmp_path / "out.txt", path, predictions())
    assert (tmp_path / "out.txt").read_bytes().count(b"\r") == 0
    assert (tmp_path / "out.txt").read_text().splitlines()[0] == HEADER


def test_a_sample_without_columns(tmp_path):
    path = tmp_path / "sample.txt"
    path.write_text("image_location\n134/00001.jpg\n\n134/00002.jpg")
    assert [frame for *_, frame in read_sample(path)] == [1, 2]


def checked(path, sample_file):
    """A validator of its own: knows the challenge's rules, shares no code with the package. Returns {location: (valence, arousal)}."""
    wanted = [row.split(",")[0].strip() for row in sample_file.read_text("utf-8-sig").splitlines()[1:] if row.strip()]
    with open(path, newline="", encoding="ascii") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image_location", "valence", "arousal"]
    assert [row[0] for row in rows[1:]] == wanted
    assert all(len(row) == 3 and re.fullmatch(r"-?[01]\.\d{3,6}", row[1]) and re.fullmatch(r"-?[01]\.\d{3,6}", row[2]) for row in rows[1:])
    values = {row[0]: (Decimal(row[1]), Decimal(row[2])) for row in rows[1:]}
    assert all(-1 <= value <= 1 for pair in values.values() for value in pair)
    return values


def test_a_submission_passes_an_independent_validator(tmp_path):
    rng = np.random.default_rng(0)
    rows = {"10-60-1280x720_right": 263, "video2.v2": 73, "134": 400}
    names = [f"{unit}/{i:05d}.jpg" for unit, n in rows.items() for i in range(1, n + 1)]
    va = {unit: rng.normal(0, 0.8, (n + 2, 2)) for unit, n in rows.items()}  # two rows more than the sample, some beyond the scale
    report = write_challenge(tmp_path / "out.txt", sample(tmp_path, names), va)
    values = checked(tmp_path / "out.txt", tmp_path / "sample.txt")
    assert len(values) == 736 == report.rows and report.unused_frames == dict.fromkeys(rows, 2)
    for unit, frame in (("134", 17), ("video2.v2", 73)):
        expected = np.clip(va[unit][frame - 1], -1, 1)
        assert [float(v) for v in values[f"{unit}/{frame:05d}.jpg"]] == pytest.approx(expected.tolist(), abs=5.1e-7)
    assert validate(tmp_path / "out.txt", tmp_path / "sample.txt") == 736


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "row 9 .* is ``, in the sample file it is `134/00004.jpg`"),
        (lambda lines: [*lines, "134/00005.jpg,0.1,0.1"], "row 10 .* is `134/00005.jpg`, in the sample file it is ``"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "row 1 .* is `10-60-1280x720_right/00002.jpg`"),
        (lambda lines: [lines[0], lines[1].rsplit(",", 1)[0], *lines[2:]], "row 1 .*not two numbers"),
        (lambda lines: [lines[0], lines[1].rsplit(",", 1)[0] + ",nan", *lines[2:]], "row 1 .*not two numbers"),
        (lambda lines: [lines[0], lines[1].rsplit(",", 1)[0] + ",1.001", *lines[2:]], "row 1 .*not two numbers"),
        (lambda lines: ["image_location,arousal,valence", *lines[1:]], "does not begin with"),
    ],
)
def test_a_broken_submission_is_refused(tmp_path, change, message):
    path = tmp_path / "out.txt"
    write_challenge(path, sample(tmp_path), predictions())
    assert validate(path, tmp_path / "sample.txt") == 9
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(UserError, match=message):
        validate(path, tmp_path / "sample.txt")


def test_what_fails_its_check_is_not_published(tmp_path, monkeypatch):
    path = tmp_path / "out.txt"
    path.write_text("before")
    monkeypatch.setattr(challenge, "_rows", lambda unit, va, decimals: ["0.1,nan"] * len(va))  # as a fault in writing would
    with pytest.raises(UserError, match=r"row 1 .*not two numbers"):
        write_challenge(path, sample(tmp_path), predictions())
    assert path.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "sample.txt"]


def test_a_sample_that_disagrees_is_explained_row_by_row(tmp_path):
    path, rows = tmp_path / "out.txt", predictions()
    path.write_text("before")
    names = [f"{unit}/{i:05d}.jpg" for unit, n in UNITS.items() for i in range(1, n + 1)]
    file = sample(tmp_path, [*names, "134/00005.jpg", "134/00002.jpg", "new/00001.jpg"])
    with pytest.raises(UserError, match=r"3 rows of .*sample.txt cannot be filled, the first is row 11, 134/00005.jpg: .*problems.txt"):
        write_challenge(path, file, rows)
    assert (tmp_path / "out.txt.problems.txt").read_text().splitlines() == [
        f"{file}: 3 rows cannot be filled",
        "row 11: 134/00005.jpg: unit 134 has 4 predicted rows",
        "row 12: 134/00002.jpg: this frame is in the sample file twice",
        "row 13: new/00001.jpg: unit new is not predicted",
    ]
    assert path.read_text() == "before"
    write_challenge(path, sample(tmp_path), rows)  # put right: the explanation goes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "sample.txt"]


def test_incomplete_predictions_write_nothing(tmp_path):
    path, rows = tmp_path / "out.txt", predictions()
    path.write_text("before")
    for broken, message in [
        ({k: v for k, v in rows.items() if k != "134"}, "4 rows .* unit 134 is not predicted"),
        ({**rows, "134": rows["134"][:2]}, "2 rows .* unit 134 has 2 predicted rows"),
        ({"134": rows["134"]}, r"5 rows .* unit 10-60-1280x720_right is not predicted"),
        ({**rows, "134": np.where(rows["134"] > 0.3, np.nan, rows["134"])}, "unit 134 is not a number"),
        ({**rows, "134": rows["134"][:, 0]}, r"unit 134 are \(4,\)"),
    ]:
        with pytest.raises(UserError, match=message):
            write_challenge(path, sample(tmp_path), broken)
    assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "out.txt.problems.txt", "sample.txt"]


def test_one_file_per_unit(tmp_path):
    report = write_units(tmp_path / "new" / "VA_Set", predictions())
    assert (report.rows, report.units) == (9, 3)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["VA_Set"]
    for unit, va in predictions().items():
        lines = (tmp_path / "new" / "VA_Set" / f"{unit}.txt").read_text().splitlines()
        assert lines[0] == "valence,arousal" and len(lines) == len(va) + 1
        assert lines[1] == "-0.200,-0.100"
        np.testing.assert_allclose(np.loadtxt(lines[1:], delimiter=",", ndmin=2), va, atol=5e-4)
    with pytest.raises(UserError, match="is there already"):
        write_units(tmp_path / "new" / "VA_Set", predictions())
    with pytest.raises(UserError, match="not a number"):
        write_units(tmp_path / "other", {"u": np.full((1, 2), np.nan)})
    assert not (tmp_path / "other").exists()


def test_foreign_sample_files(tmp_path):
    with pytest.raises(UserError, match="there is no sample file"):
        write_challenge(tmp_path / "out", tmp_path / "gone", predictions())
    with pytest.raises(UserError, match="begins with `valence,arousal`"):
        write_challenge(tmp_path / "out", sample(tmp_path, header="valence,arousal"), predictions())
    with pytest.raises(UserError, match="line 3: `134` is not <unit>/<frame>"):
        write_challenge(tmp_path / "out", sample(tmp_path, ["134/00001.jpg", "134"]), predictions())
    with pytest.raises(UserError, match=r"line 2: `134/00000\.jpg`"):  # frames count from 1
        write_challenge(tmp_path / "out", sample(tmp_path, ["134/00000.jpg"]), predictions())
    for content, message in ((b"", "begins with ``"), (f"{HEADER}\nvid\xe9o/00001.jpg".encode("latin-1"), "is not a text file")):
        (tmp_path / "other.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            write_challenge(tmp_path / "out", tmp_path / "other.txt", predictions())
    (tmp_path / "empty.txt").write_text(HEADER + "\n")
    with pytest.raises(UserError, match="names no frame"):
        write_challenge(tmp_path / "out", tmp_path / "empty.txt", predictions())
    with pytest.raises(UserError, match="2 decimals"):
        write_challenge(tmp_path / "out", sample(tmp_path), predictions(), decimals=2)
