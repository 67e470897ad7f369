import numpy as np
import pytest

from jmt_dist.errors import UserError
from jmt_dist.evaluate.challenge import HEADER, read_sample, write_challenge

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


def test_incomplete_predictions_write_nothing(tmp_path):
    path, rows = tmp_path / "out.txt", predictions()
    path.write_text("before")
    for broken, message in [
        ({k: v for k, v in rows.items() if k != "134"}, "unit 134 is not predicted"),
        ({**rows, "134": rows["134"][:2]}, "unit 134 lacks 2 frames"),
        ({"134": rows["134"]}, r"unit 10-60-1280x720_right is not predicted, and 1 more units"),
        ({**rows, "134": np.where(rows["134"] > 0.3, np.nan, rows["134"])}, "unit 134 is not a number"),
        ({**rows, "134": rows["134"][:, 0]}, r"unit 134 are \(4,\)"),
    ]:
        with pytest.raises(UserError, match=message):
            write_challenge(path, sample(tmp_path), broken)
    assert path.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "sample.txt"]


def test_foreign_sample_files(tmp_path):
    with pytest.raises(UserError, match="there is no sample file"):
        write_challenge(tmp_path / "out", tmp_path / "gone", predictions())
    with pytest.raises(UserError, match="begins with `valence,arousal`"):
        write_challenge(tmp_path / "out", sample(tmp_path, header="valence,arousal"), predictions())
    with pytest.raises(UserError, match="line 3: `134` is not <unit>/<frame>"):
        write_challenge(tmp_path / "out", sample(tmp_path, ["134/00001.jpg", "134"]), predictions())
    with pytest.raises(UserError, match=r"line 2: `134/00000\.jpg`"):  # frames count from 1
        write_challenge(tmp_path / "out", sample(tmp_path, ["134/00000.jpg"]), predictions())
    (tmp_path / "empty.txt").write_text(HEADER + "\n")
    with pytest.raises(UserError, match="names no frame"):
        write_challenge(tmp_path / "out", tmp_path / "empty.txt", predictions())
    with pytest.raises(UserError, match="2 decimals"):
        write_challenge(tmp_path / "out", sample(tmp_path), predictions(), decimals=2)
