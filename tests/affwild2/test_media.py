"""Frame times of containers written here, and the sample at which a frame ends."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from jmt_dist.affwild2.media import RATE, MediaError, end_samples, fallback_timestamps, frame_timestamps, sound_stream
from tests.affwild2.containers import STEADY, click, pictures, write


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


def test_an_audio_file_has_no_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", sound=click(1, 0.5, RATE), audio_codec="pcm_s16le")
    with pytest.raises(MediaError, match="no video stream"):
        frame_timestamps(path)


@pytest.mark.parametrize(("channels", "audio_start"), [(1, 0.4), (2, 0.0)])
def test_a_sound_stream_as_declared(tmp_path: Path, channels: int, audio_start: float) -> None:
    sound = np.ones((16_000, channels), np.int16)
    path = write(tmp_path / "a.mkv", times=STEADY, sound=sound, audio_codec="pcm_s16le", rate=16_000, audio_start=audio_start)
    stream = sound_stream(path)
    assert stream is not None and (stream.rate, stream.channels) == (16_000, channels)
    assert stream.start == pytest.approx(audio_start, abs=2e-3)
    assert sound_stream(write(tmp_path / "mute.mkv", times=STEADY)) is None
    (tmp_path / "rubbish.mp4").write_bytes(b"rubbish" * 99)
    with pytest.raises(MediaError, match="cannot be read"):
        sound_stream(tmp_path / "rubbish.mp4")


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
