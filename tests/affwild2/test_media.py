"""Containers written here with known clicks and frame times, read back on the common clock."""

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

from jmt_dist.affwild2.media import RATE, MediaError, _Track, end_samples, fallback_timestamps, frame_timestamps, read_audio
from jmt_dist.errors import UserError

PICTURE = np.full((64, 64, 3), 90, np.uint8)


def click(seconds: float, at: float, rate: int, channels: int = 1) -> NDArray[np.int16]:
    """Silence with one click of 0.5 ms at `at` seconds, int16 [samples, channels]."""
    sound = np.zeros((round(seconds * rate), channels), np.int16)
    start = round(at * rate)
    sound[start : start + max(rate // 2000, 1)] = 20_000
    return sound


def loudest(sound: NDArray[np.int16] | None) -> float:
    """Seconds of the loudest sample."""
    assert sound is not None
    return float(np.abs(sound.astype(np.int32)).argmax()) / RATE


def write(
    path: Path,
    *,
    times: NDArray[np.float64] | None = None,
    codec: str = "libx264",
    sound: NDArray[np.int16] | None = None,
    audio_codec: str = "aac",
    rate: int = RATE,
    audio_start: float = 0.0,
    holes: list[tuple[float, float]] | None = None,
    clock: int = 1000,
    options: dict[str, str] | None = None,
) -> Path:
    """A file with frames at `times` seconds and `sound` [samples, channels] from `audio_start`; holes of it are not written."""
    with av.open(str(path), "w", options=options or {}) as container:
        streams = []
        if times is not None:
            video = container.add_stream(codec, rate=30)
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
            video.codec_context.time_base = Fraction(1, clock)
            streams.append((video, pictures(times, clock)))
        if sound is not None:
            audio = container.add_stream(audio_codec, rate=rate, layout="stereo" if sound.shape[1] == 2 else "mono")
            streams.append((audio, pieces(sound, rate, audio.codec_context.frame_size or 1024, audio_start, holes or [])))
        for stream, frames in streams:
            for frame in [*frames, None]:
                container.mux(stream.encode(frame))
    return path


def pictures(times: NDArray[np.float64], clock: int) -> list[av.VideoFrame]:
    frames = []
    for i, time in enumerate(times):
        frame = av.VideoFrame.from_ndarray(np.roll(PICTURE, i, axis=2) + np.uint8(i % 50), "rgb24")
        frame.pts, frame.time_base = round(time * clock), Fraction(1, clock)
        frames.append(frame)
    return frames


def pieces(sound: NDArray[np.int16], rate: int, size: int, start: float, holes: list[tuple[float, float]]) -> list[av.AudioFrame]:
    frames = []
    for first in range(0, len(sound), size):
        if any(a <= first / rate < b for a, b in holes):
            continue
        part = np.ascontiguousarray(sound[first : first + size])
        frame = av.AudioFrame.from_ndarray(part.reshape(1, -1), "s16", "stereo" if sound.shape[1] == 2 else "mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, first + round(start * rate), Fraction(1, rate)
        frames.append(frame)
    return frames


STEADY = np.arange(50) / 25


@pytest.mark.parametrize(
    ("name", "codec", "clock"),
    [("a.mp4", "libx264", 12_800), ("a.mkv", "libx264", 1000), ("a.avi", "mpeg4", 25), ("a.mp4", "mpeg4", 12_800), ("a.avi", "mjpeg", 25)],
)
def test_steady_frames(tmp_path: Path, name: str, codec: str, clock: int) -> None:
    if codec == "mjpeg":
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mjpeg", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
            for frame in [*pictures(STEADY, 25), None]:
                container.mux(stream.encode(frame))
    else:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for frame in [*pictures(STEADY, clock), None]:
                container.mux(stream.encode(frame))
    times = frame_timestamps(path)
    assert times.dtype == np.float64
    np.testing.assert_allclose(times, STEADY, atol=1e-6)


def test_reordered_frames_come_in_order_of_presentation(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", times=STEADY)
    with av.open(str(path)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert stored != sorted(stored)  # x264 uses B-frames: the file's order is not the order of presentation
    np.testing.assert_allclose(frame_timestamps(path), STEADY, atol=1e-6)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate(tmp_path: Path, name: str) -> None:
    intervals = np.random.default_rng(0).choice([0.017, 0.033, 0.040, 0.071], 80)
    times = np.concatenate([[0.0], np.cumsum(intervals)])
    np.testing.assert_allclose(frame_timestamps(write(tmp_path / name, times=times)), times, atol=1e-3)


def test_timestamps_equal_those_of_decoded_frames(tmp_path: Path) -> None:
    """Independent route: the decoder's frames in its output order."""
    times = np.concatenate([[0.4], 0.4 + np.cumsum(np.random.default_rng(1).choice([0.02, 0.05], 60))])
    path = write(tmp_path / "a.mkv", times=times)
    with av.open(str(path)) as container:
        decoded = np.array([frame.time for frame in container.decode(video=0)])
    np.testing.assert_allclose(frame_timestamps(path), decoded - decoded[0], atol=1e-9)


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


def test_an_audio_file_has_no_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", sound=click(1, 0.5, RATE), audio_codec="pcm_s16le")
    with pytest.raises(MediaError, match="no video stream"):
        frame_timestamps(path)


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


def test_end_samples_inside_and_beyond() -> None:
    times = np.array([0.10, 0.13, 0.17, 0.20, 0.24, 0.34])  # median interval 0.04
    frames = np.array([[-1, 0, 1], [6, 7, 9]])
    expected = np.rint(np.array([[0.10 - 0.08, 0.10 - 0.04, 0.10], [0.34, 0.38, 0.46]]) * RATE).astype(np.int64)
    result = end_samples(times, frames)
    assert result.dtype == np.int64
    np.testing.assert_array_equal(result, expected)


def test_end_samples_may_be_negative() -> None:
    np.testing.assert_array_equal(end_samples(np.arange(4) / 10, np.array([-9, 1])), [-RATE, 0])


def test_end_samples_of_one_frame_and_of_none() -> None:
    np.testing.assert_array_equal(end_samples(np.array([0.5]), np.array([1, 31])), [RATE // 2, RATE * 3 // 2])
    with pytest.raises(ValueError, match="without timestamps"):
        end_samples(np.array([]), np.array([1]))


def test_equal_timestamps_do_not_stop_time() -> None:
    times = np.array([0.0, 0.0, 0.0, 0.0, 0.04])
    np.testing.assert_array_equal(end_samples(times, np.array([6])), [round(0.08 * RATE)])


def test_fallback() -> None:
    np.testing.assert_allclose(fallback_timestamps(61)[[0, 30, 60]], [0, 1, 2])
    np.testing.assert_array_equal(end_samples(fallback_timestamps(40), np.arange(1, 60)), np.rint(np.arange(59) * 1470).astype(np.int64))


def test_a_bare_stream_without_times_runs_at_its_declared_rate(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"  # by its name; the content is bare H.264
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in [*pictures(np.arange(30) / 20, 20), None]:
            container.mux(stream.encode(frame))
    times = frame_timestamps(path)
    np.testing.assert_allclose(times - times[0], np.arange(30) / 20, atol=1e-6)
