"""One sample for the eye: the sheet shows its frames where they belong, and a wrong key is an error with a remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jmt_dist.data.shards import open_shards
from jmt_dist.data.show import contact_sheet, describe, load_sample
from jmt_dist.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_sheet_has_every_frame_at_its_place(packed: Path, tree: Path) -> None:
    tar, entry, sample = load_sample(open_shards(packed), "a1-0000-2")
    sheet = np.asarray(contact_sheet(entry, sample))
    assert sheet.shape == (9 * 124 + 120, 8 * 112, 3)
    for k, frame in ((7, 3), (12, 23), (70, 255)):  # strip frame, source frame 1 + 2 + 4 (k - 7)
        row, column = divmod(k + 1, 8)
        tile = sheet[124 * row : 124 * row + 112, 112 * column : 112 * column + 112]
        source = np.asarray(Image.open(tree / "cropped_aligned" / "a1" / f"{frame:05d}.jpg"))
        assert np.array_equal(tile[1:111], source[1:111])
    assert not sheet[1:111, 113:].any()  # the lead-in of the first segment is black
    text = "\n".join(describe(open_shards(packed), tar, entry, sample))
    assert "segment 0, phase 2, strip mode 0" in text and "source frames -25 to 255, 64 present" in text


def test_unknown_keys_are_refused(packed: Path) -> None:
    manifest = open_shards(packed)
    for key, message in (("a1", "is not <unit>"), ("nobody-0000-0", "no unit nobody"), ("a1-0009-0", "no sample a1-0009-0")):
        with pytest.raises(UserError, match=message) as error:
            load_sample(manifest, key)
        assert error.value.remedy


def test_the_program_writes_the_sheet_and_says_where(packed: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "shards" / "show_sample.py"), f"shards={packed}", "key=b%2E2-0000-1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0].startswith("b%2E2-0000-1 in 0") and lines[-1] == "b%2E2-0000-1.png"
    assert "licence forbids" in lines[-2]
    assert Image.open(tmp_path / lines[-1]).format == "PNG"
