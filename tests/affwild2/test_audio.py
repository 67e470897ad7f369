"""Known clicks, tones and noise in containers written here, read back on the common clock."""

from __future__ import annotations

import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import resample_poly

from jmt_dist.affwild2.media import RATE, MediaError, _Track, frame_timestamps, read_audio
from jmt_dist.errors import UserError
from tests.affwild2.containers import STEADY, click, write


def loudest(sound: NDArray[np.int16] | None) -> float:
    """Seconds of the loudest sample."""
    assert sound is not None
    return float(np.abs(sound.astype(np.int32)).argmax()) / RATE


@pytest.mark.parametrize(
    ("name", "codec", "audio_codec", "rate", "channels", "tolerance"),
    [
        ("a.avi", "mpeg4", "pcm_s16le", 44_100, 1, 1e-9),
        ("a.avi", "mpeg4", "pcm_s16le", 8_000, 1, 2e-4),
        ("a.mkv", "libx264", "pcm_s16le", 48_000, 2, 1e-3),
        ("a.mkv", "libx264", "flac", 16_000, 2, 1e-3),
        ("a.mp4", "libx264", "aac", 44_100, 2, 2e-3),
        ("a.mp4", "libx264", "aac", 48_000, 1, 2e-3),
        ("a.mp4", "libx264", "aac", 22_050, 1, 2e-3),
    ],
)
def test_a_click_is_heard_when_it_was_made(
    tmp_path: Path, name: str, codec: str, audio_codec: str, rate: int, channels: int, tolerance: float
) -> None:
    path = write(
        tmp_path / name, times=STEADY, codec=codec, clock=25, sound=click(2, 1.25, rate, channels), audio_codec=audio_codec, rate=rate
    )
    sound = read_audio(path)
    assert sound is not None and sound.dtype == np.int16 and sound.ndim == 1
    assert loudest(sound) == pytest.approx(1.25, abs=tolerance + 3e-4)  # the click is 0.5 ms wide
    assert len(sound) / RATE == pytest.approx(2, abs=0.05)


def test_reading_may_stop_early(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-9000, 9000, (3 * RATE, 1)).astype(np.int16)
    path = write(tmp_path / "a.avi", times=STEADY, codec="mpeg4", clock=25, sound=noise, audio_codec="pcm_s16le")
    part = read_audio(path, until=1.0)
    assert part is not None and RATE < len(part) < 1.2 * RATE
    np.testing.assert_array_equal(part, noise[: len(part), 0])


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
@pytest.mark.parametrize(("video_start", "audio_start"), [(0.0, 0.5), (0.5, 0.0), (0.0, 0.0), (1.0, 1.2)])
def test_offset_between_the_streams(tmp_path: Path, name: str, video_start: float, audio_start: float) -> None:
    """A click made 1 s after the first frame is heard 1 s after its timestamp, whichever stream begins first."""
    codec = "pcm_s16le" if name == "a.mkv" else "aac"
    sound = click(3, video_start + 1 - audio_start, RATE)
    path = write(tmp_path / name, times=STEADY + video_start, sound=sound, audio_codec=codec, audio_start=audio_start)
    times, heard = frame_timestamps(path), read_audio(path)
    assert loudest(heard) - times[0] == pytest.approx(1.0, abs=2e-3)
    assert heard is not None
    if codec == "pcm_s16le":
        silent = max(audio_start - video_start, 0.0)
        assert times[0] == pytest.approx(max(video_start - audio_start, 0.0), abs=2e-3)
        assert len(heard) / RATE == pytest.approx(silent + 3, abs=2e-3)


def test_transport_stream_with_a_clock_far_from_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ts", times=STEADY + 5000, clock=90_000, sound=click(2, 1, RATE), audio_start=5000.0)
    times, heard = frame_timestamps(path), read_audio(path)
    assert loudest(heard) - times[0] == pytest.approx(1.0, abs=2e-3)
    assert heard is not None and len(heard) < 3 * RATE  # no silence from the beginning of the clock


def test_a_gap_is_silence_and_what_follows_keeps_its_time(tmp_path: Path) -> None:
    tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(4 * RATE) / RATE)).astype(np.int16)[:, None]
    path = write(tmp_path / "a.mkv", times=STEADY, sound=tone, audio_codec="pcm_s16le", holes=[(1.0, 2.5)])
    heard = read_audio(path)
    assert heard is not None and abs(len(heard) - 4 * RATE) < 100
    first, second = int(1.03 * RATE), int(2.49 * RATE)  # frames are 23 ms long
    assert not heard[first:second].any()
    correct = tone[:, 0].astype(np.float64)
    for part in (slice(0, int(0.99 * RATE)), slice(int(2.53 * RATE), int(3.9 * RATE))):
        shifts = [np.corrcoef(heard[part], np.roll(correct, k)[part])[0, 1] for k in range(-45, 46)]
        assert max(shifts) > 0.999  # the same tone, within the container's rounding to 1 ms


def test_rounded_timestamps_make_no_gap(tmp_path: Path) -> None:
    """Matroska rounds to 1 ms; samples must follow each other without clicks all the same."""
    noise = np.random.default_rng(0).integers(-9000, 9000, (5 * RATE, 1)).astype(np.int16)
    path = write(tmp_path / "a.mkv", times=STEADY, sound=noise, audio_codec="pcm_s16le")
    np.testing.assert_array_equal(read_audio(path), noise[:, 0])


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 48_000])
def test_resampling_against_scipy(tmp_path: Path, rate: int) -> None:
    """Tones below half of either rate come out as a polyphase filter of SciPy gives them: phase and level."""
    t = np.arange(2 * rate) / rate
    tone = (6000 * (np.sin(2 * np.pi * 300 * t) + 0.5 * np.sin(2 * np.pi * 1700 * t + 1))).astype(np.int16)
    path = write(tmp_path / "a.mkv", sound=tone[:, None], audio_codec="pcm_s16le", rate=rate)
    heard = read_audio(path)
    assert heard is not None
    ratio = Fraction(RATE, rate)
    expected = resample_poly(tone.astype(np.float64), ratio.numerator, ratio.denominator)
    assert abs(len(heard) - len(expected)) <= 32
    inner = slice(RATE // 10, len(expected) - RATE // 10)
    error = heard[inner] - expected[inner]
    assert np.sqrt((error**2).mean()) < 0.005 * np.sqrt((expected[inner] ** 2).mean())


def test_stereo_is_mixed_evenly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stereo = np.stack([rng.integers(-30_000, 30_000, RATE), rng.integers(-30_000, 30_000, RATE)], axis=1).astype(np.int16)
    path = write(tmp_path / "a.mkv", sound=stereo, audio_codec="pcm_s16le")
    heard = read_audio(path)
    assert heard is not None
    assert np.abs(heard - stereo.astype(np.float64).mean(axis=1)).max() <= 1


def collected(*frames: tuple[float | None, int], limit: float = 100.0) -> NDArray[np.int16] | None:
    """What becomes of frames of 1000 samples at 44.1 kHz, given as (time, value)."""
    track = _Track(RATE, limit)
    for at, value in frames:
        frame = av.AudioFrame.from_ndarray(np.full((1, 1000), value, np.int16), "s16", "mono")
        frame.sample_rate = RATE
        track.add(frame, at)
    return track.finish()


def test_what_lies_before_zero_is_cut() -> None:
    """As of a file whose declared start is later than its first samples."""
    heard = collected((-1600 / RATE, 1), (-600 / RATE, 2), (400 / RATE, 3))
    np.testing.assert_array_equal(heard, np.repeat([2, 3], [400, 1000]))


def test_frames_without_a_time_follow_each_other() -> None:
    np.testing.assert_array_equal(collected((None, 1), (None, 2), (2000 / RATE, 3)), np.repeat([1, 2, 3], 1000))


def test_an_absurd_time_is_not_believed() -> None:
    """One wrong clock value must not ask for days of silence; the frame follows the one before."""
    times = [(0.0, 1), (1e9, 2), (2000 / RATE, 3)]
    np.testing.assert_array_equal(collected(*times), np.repeat([1, 2, 3], 1000))
    np.testing.assert_array_equal(collected((1e9, 1), (1e9, 2)), np.repeat([1, 2], 1000))


def test_no_audio_stream_and_an_empty_one(tmp_path: Path) -> None:
    assert read_audio(write(tmp_path / "silent.mp4", times=STEADY)) is None
    assert read_audio(write(tmp_path / "empty.mkv", times=STEADY, sound=np.zeros((0, 1), np.int16), audio_codec="pcm_s16le")) is None


@pytest.mark.parametrize("reader", [frame_timestamps, read_audio])
def test_unreadable_containers(tmp_path: Path, reader: object) -> None:
    whole = write(tmp_path / "whole.mp4", times=STEADY, sound=click(2, 1, RATE)).read_bytes()
    files = {
        "noise.mp4": bytes(range(256)) * 40,
        "empty.avi": b"",
        "cut.mp4": whole[: whole.index(b"moov")],
    }  # the index of an MP4 is its end
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in [*files, "absent.mp4", "."]:
        with pytest.raises(MediaError, match="cannot be read") as error:
            reader(tmp_path / name)  # type: ignore[operator]
        assert isinstance(error.value, UserError) and error.value.remedy


def test_a_cut_avi_is_read_up_to_the_cut(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-9000, 9000, (2 * RATE, 1)).astype(np.int16)
    whole = write(tmp_path / "a.mkv", times=STEADY, sound=noise, audio_codec="pcm_s16le")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    heard, times = read_audio(cut), frame_timestamps(cut)
    assert heard is not None and 0.3 * RATE < len(heard) < 2 * RATE
    np.testing.assert_array_equal(heard, noise[: len(heard), 0])
    assert 5 < len(times) < 50


def test_damaged_audio_packets_are_silence(tmp_path: Path) -> None:
    """What is left keeps its time; a stream of which nothing is left is an error, not silence."""
    sound = click(3, 2.5, RATE)
    path = write(tmp_path / "a.mp4", sound=sound)
    with av.open(str(path)) as container:
        spots = [(p.pos, p.size, float(p.pts * p.time_base)) for p in container.demux(audio=0) if p.size]
    data = bytearray(path.read_bytes())
    for where, size, time in spots:
        if 1.0 < time < 2.0:
            data[where : where + size] = b"\xff" * size
    (tmp_path / "hurt.mp4").write_bytes(data)
    assert loudest(read_audio(tmp_path / "hurt.mp4")) == pytest.approx(2.5, abs=3e-3)
    for where, size, _ in spots:
        data[where : where + size] = b"\xff" * size
    (tmp_path / "dead.mp4").write_bytes(data)
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_audio(tmp_path / "dead.mp4")


def test_an_hour_of_audio_fits_in_memory(tmp_path: Path) -> None:
    """The result of an hour is 318 MB; reading it may take little more than that."""
    path = tmp_path / "hour.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        second = (np.arange(8000) % 100).astype("<i2").tobytes()
        for _ in range(3600):
            file.writeframesraw(second)
    program = (
        "import resource, sys\nfrom jmt_dist.affwild2.media import read_audio\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "sound = read_audio(sys.argv[1])\n"
        "print(len(sound), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    out = subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True).stdout
    samples, kilobytes = map(int, out.split())
    assert abs(samples - 3600 * RATE) < 100
    assert kilobytes < 420_000
