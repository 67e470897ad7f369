"""The sample contract: keys, members, audio windows against slow and obvious references."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from jmt_dist.data.geometry import WINDOW
from jmt_dist.data.sample import (
    LONGEST_NAME,
    AudioKind,
    Sample,
    audio_of,
    decode_audio,
    encode_audio,
    escape,
    key,
    labels_of,
    parse_key,
    unescape,
)


@given(st.text(min_size=1, max_size=30), st.integers(0, 20_000), st.integers(0, 3))
def test_keys_are_reversible_and_safe_in_tars_and_indexes(unit: str, m: int, p: int) -> None:
    unit = unit.encode("utf-8", "ignore").decode() or "x"
    found = key(unit, m, p)
    assert parse_key(found) == (unit, m, p)
    assert found.isascii() and not set(found) & set(" ./\\\t\n\0\"'")


@given(st.text(), st.text())
def test_different_units_have_different_keys(one: str, other: str) -> None:
    one, other = (text.encode("utf-8", "ignore").decode() for text in (one, other))
    assert (escape(one) == escape(other)) == (one == other)
    assert unescape(escape(one)) == one


def test_spelling_of_keys() -> None:
    assert key("10-60-1280x720_right", 3, 2) == "10-60-1280x720_right-0003-2"
    assert key("a.b%2E c", 185, 0) == "a%2Eb%252E%20c-0185-0"
    for wrong in ("video1", "video1-0001", "video1-0001-4", "a.b-0001-2", "-0001-2", "a-1-2", "a%2-0001-1"):
        with pytest.raises(ValueError, match="segment"):
            parse_key(wrong)


def test_the_longest_name_just_fits_into_ustar() -> None:
    import tarfile

    for length, fits in ((LONGEST_NAME, True), (LONGEST_NAME + 3, False)):
        info = tarfile.TarInfo(f"{key('x' * length, 185, 3)}.present.u8")
        assert (len(info.name) <= 100) == fits


def sample(kind: AudioKind = "wav") -> Sample:
    rng = np.random.default_rng(0)
    pcm = rng.integers(-2000, 2000, 60_000).astype(np.int16)
    va = rng.uniform(-1, 1, (64, 2)).astype(np.float32)
    va[5] = np.nan
    ends = np.linspace(WINDOW, 60_000, 64).astype(np.int32)
    return Sample(b"strip", encode_audio(pcm, kind), kind, ends, va, np.ones(71, np.uint8), np.array([1, 2, 3, 0], np.int32))


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_members_round_trip_as_little_endian_arrays(kind: AudioKind) -> None:
    one = sample(kind)
    members = dict(one.members())
    sizes = {name: len(data) for name, data in members.items() if not name.startswith(("strip", "audio"))}
    assert sizes == {"ends.i32": 256, "va.f32": 512, "present.u8": 71, "id.i32": 16}
    assert members["id.i32"] == b"\1\0\0\0\2\0\0\0\3\0\0\0\0\0\0\0"
    back = Sample.from_members(members)
    assert back.kind == kind and back.audio == one.audio and back.strip == one.strip
    for name in ("ends", "va", "present", "id"):
        assert np.array_equal(getattr(back, name), getattr(one, name), equal_nan=name == "va")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"va.f32": b"x" * 511}, "va.f32 has 511 bytes"),
        ({"va.f32": None}, "instead of"),
        ({"more.txt": b""}, "instead of"),
        ({"audio.flac": b""}, "2 audio members"),
        ({"audio.wav": None}, "0 audio members"),
    ],
)
def test_wrong_members_are_named(change: dict[str, bytes | None], message: str) -> None:
    members = {name: data for name, data in {**dict(sample().members()), **change}.items() if data is not None}
    with pytest.raises(ValueError, match=message):
        Sample.from_members(members)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_audio_is_lossless_and_any_reader_agrees(kind: AudioKind) -> None:
    pcm = np.random.default_rng(1).integers(-32768, 32768, 50_001).astype(np.int16)
    data = encode_audio(pcm, kind)
    found, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate == 44_100 and np.array_equal(found, pcm) and np.array_equal(decode_audio(data, kind), pcm)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_damaged_or_foreign_audio_is_refused(kind: AudioKind) -> None:
    data = encode_audio(np.zeros(50_000, np.int16), kind)
    stereo = io.BytesIO()
    soundfile.write(stereo, np.zeros((99, 2), np.int16), 44_100, format=kind.upper(), subtype="PCM_16")
    slow = io.BytesIO()
    soundfile.write(slow, np.zeros(99, np.int16), 16_000, format=kind.upper(), subtype="PCM_16")
    for wrong in (b"", b"RIFF", data[:20], data[: len(data) // 2], stereo.getvalue(), slow.getvalue()):
        with pytest.raises(ValueError, match=r"cannot be decoded|not complete"):
            decode_audio(wrong, kind)


def windows_by_hand(pcm: np.ndarray, times: np.ndarray, m: int, p: int) -> list[np.ndarray]:
    """The 64 windows one by one, sample by sample, from DESIGN section 4: 47,040 samples that end at the end frame's time."""
    step = float(np.median(np.diff(times)))
    found = []
    for n in range(64):
        frame = 256 * m + 1 + p + 4 * n
        time = times[frame - 1] if frame <= len(times) else times[-1] + (frame - len(times)) * step
        end = round(time * 44_100)
        padded = np.concatenate([np.zeros(47_040, np.int16), pcm, np.zeros(max(0, end - len(pcm)) + 10, np.int16)])
        found.append(padded[end : end + 47_040])
    return found


CASES = [(30, 400, 14.0, 0, 0, 0.0), (30, 400, 14.0, 1, 3, 0.0), (14, 300, 20.0, 0, 2, 0.4), (60, 90, 1.5, 0, 1, 0.0)]


@pytest.mark.parametrize(("fps", "frames", "seconds", "m", "p", "start"), [*CASES, (25, 300, 2.0, 1, 0, 0.1)])
def test_every_window_is_the_sound_before_its_end_frame(fps: int, frames: int, seconds: float, m: int, p: int, start: float) -> None:
    rng = np.random.default_rng(fps)
    pcm = rng.integers(-30000, 30000, round(seconds * 44_100)).astype(np.int16)
    times = start + np.arange(frames) / fps
    times[1:] += rng.uniform(-0.2, 0.2, frames - 1) / fps  # variable frame rate
    audio, ends = audio_of(pcm, times, m, p)
    assert ends.dtype == np.int32 and ends.min() == WINDOW and ends.max() == len(audio)
    for n, wanted in enumerate(windows_by_hand(pcm, times, m, p)):
        assert np.array_equal(audio[ends[n] - WINDOW : ends[n]], wanted), n


def test_no_sound_is_silence_of_the_right_length() -> None:
    audio, ends = audio_of(np.zeros(0, np.int16), np.arange(30) / 30, 0, 0)
    assert not audio.any() and len(audio) == ends[-1] == WINDOW + 63 * 4 * 1470


def test_labels_are_of_the_end_frames_and_nan_past_the_end() -> None:
    va = np.arange(600, dtype=np.float32).reshape(300, 2)
    found = labels_of(va, 1, 2)
    assert found[:, 0].tolist()[:11] == [2.0 * (256 + 2 + 4 * n) for n in range(11)]
    assert np.isnan(found[11:]).all()  # frame 256 + 3 + 44 = 303 is past the end
    assert np.isnan(labels_of(np.full((9, 2), np.nan, np.float32), 0, 0)).all()
