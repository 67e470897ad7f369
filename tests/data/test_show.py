"""One sample for the eye: the sheet shows its frames where they belong, and a wrong key is an error with a remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import librosa
import numpy as np
import pytest
from PIL import Image, ImageColor

from jmt_dist.data import show
from jmt_dist.data.sample import encode_audio
from jmt_dist.data.shards import open_shards
from jmt_dist.data.show import contact_sheet, describe, load_sample
from jmt_dist.errors import UserError

ROOT = Path(__file__).parents[2]


def tile(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    """Rows 1..110 of a frame in the sheet: rows 0 and 111 may take colour from the neighbour in the strip."""
    top, left = show.TOP + row * (112 + show.CAPTION), show.LEFT + column * 112
    return sheet[top + 1 : top + 111, left : left + 112]


@pytest.mark.parametrize("offset", [0, 7])
def test_the_sheet_has_every_frame_of_every_clip_at_its_place(packed: Path, tree: Path, offset: int) -> None:
    tar, entry, sample = load_sample(open_shards(packed), "a1-0000-2")
    sheet = np.asarray(contact_sheet(entry, sample, offset))
    for j in range(8):
        for k in range(8):
            frame = 3 + 4 * (offset + 8 * j + k - 7)  # source frame of a strip frame: 1 + phase + 4 (strip frame - 7)
            if frame < 1:
                assert not tile(sheet, j, k).any()
            else:
                source = np.asarray(Image.open(tree / "cropped_aligned" / "a1" / f"{frame:05d}.jpg"))
                assert np.array_equal(tile(sheet, j, k), source[1:111])
    text = "\n".join(describe(open_shards(packed), tar, entry, sample, offset))
    assert "segment 0, phase 2, strip mode 0" in text and "source frames -25 to 255, 64 present" in text
    assert text.splitlines()[-1].split()[:3] == ["clip", "7", str(3 + 4 * (offset + 56))]


def test_its_spectrograms_are_librosas() -> None:
    rng = np.random.default_rng(0)
    sound = (6_000 * np.sin(np.arange(47_040) / 9) * np.linspace(0, 1, 47_040) + rng.normal(0, 900, 47_040)).astype(np.int16)
    power = librosa.feature.melspectrogram(
        y=sound / 32768, sr=44_100, n_fft=1024, win_length=882, hop_length=441, n_mels=64, htk=True, norm=None, pad_mode="reflect"
    )
    wanted = librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=80)
    assert show.log_mel(sound).shape == wanted.shape == (64, 107)
    assert np.abs(show.log_mel(sound) - wanted).max() < 1e-3


def test_the_spectrograms_stand_beside_their_clips(packed: Path) -> None:
    """A click in clip 3's window alone is bright in row 3 alone; silence is dark, and a unit without labels says so."""
    _, entry, sample = load_sample(open_shards(packed), "t8-0000-0")
    audio = np.zeros(int(sample.ends[-1]), np.int16)
    audio[int(sample.ends[31]) - 20_000] = 20_000  # clip 3 of offset 7 ends at n = 31; clip 4's window begins after it
    sheet = np.asarray(contact_sheet(entry, replace(sample, audio=encode_audio(audio, "wav"), kind="wav")))
    left = show.LEFT + 8 * 112 + show.GAP
    bright = [int(sheet[show.TOP + j * 128 : show.TOP + j * 128 + 112, left : left + show.MEL_WIDTH].max()) for j in range(8)]
    assert bright[3] > 200 and max(bright[:3] + bright[4:]) < 10


def test_labels_are_drawn_over_time(packed: Path) -> None:
    """In the chart a curve of each colour; of a unit without labels none."""

    def colours(key: str) -> set[tuple[int, ...]]:
        _, entry, sample = load_sample(open_shards(packed), key)
        chart = np.asarray(contact_sheet(entry, sample))[-show.WAVE - show.CHART : -show.WAVE, show.LEFT + 2 :]
        return {tuple(pixel) for pixel in chart.reshape(-1, 3).tolist()}

    blue, red = (ImageColor.getrgb(name) for name in (show.BLUE, show.RED))
    assert {blue, red} <= colours("a1-0000-0") and not {blue, red} & colours("t8-0000-0")


def test_unknown_keys_are_refused(packed: Path) -> None:
    manifest = open_shards(packed)
    for key, message in (("a1", "is not <unit>"), ("nobody-0000-0", "no unit nobody"), ("a1-0009-0", "no sample a1-0009-0")):
        with pytest.raises(UserError, match=message) as error:
            load_sample(manifest, key)
        assert error.value.remedy


def test_a_damaged_sample_is_an_error_with_a_remedy(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "s")
    manifest = open_shards(tmp_path / "s")
    _, entry, _ = load_sample(manifest, "")
    tar = tmp_path / "s" / "00000.tar"
    data = bytearray(tar.read_bytes())
    at = entry.members[0][1]
    data[at : at + 2] = b"no"
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"00000\.tar is damaged: strip: no SOI"):
        load_sample(manifest, "")
    (tmp_path / "s" / "00000.idx").write_text("v1.2 1\nrubbish\n")
    with pytest.raises(UserError, match="cannot be read: line 2") as error:
        load_sample(manifest, "")
    assert "verify_shards.py" in error.value.remedy
    tar.unlink()
    shutil.copy(packed / "00000.idx", tmp_path / "s")
    with pytest.raises(UserError, match=r"cannot be read: .*00000\.tar"):
        load_sample(manifest, "")


def test_the_program_writes_the_sheet_and_says_where(packed: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "shards" / "show_sample.py"), str(packed), "key=b%2E2-0000-1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0].startswith("b%2E2-0000-1 in 0") and lines[-1] == "b%2E2-0000-1.png"
    assert "licence forbids" in lines[-2]
    assert Image.open(tmp_path / lines[-1]).format == "PNG"
