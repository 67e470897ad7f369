"""The fixture's containers and label files: streams, rows against frames, sound where the pictures need it."""

from __future__ import annotations

import av
import numpy as np
import pytest

from jmt_dist.affwild2.fixture import FixtureReport, cues_of
from jmt_dist.affwild2.fixture_plan import UnitPlan, VideoPlan
from jmt_dist.affwild2.fixture_voice import make_voice
from jmt_dist.affwild2.labels import read_labels
from jmt_dist.affwild2.media import MediaError, frame_timestamps, read_audio
from jmt_dist.errors import UserError

from .made import labels_of, media_of


def test_containers_hold_the_planned_streams(made: FixtureReport, plans: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    kinds = set()
    for video in {v.stem: v for v, _ in plans.values()}.values():
        if video.people[0].gotcha in ("unreadable-media", "no-media", "test-unreadable"):
            continue
        path = media_of(made.out, video)
        assert len(frame_timestamps(path)) == video.frames
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == {".mp4": "h264", ".avi": "mpeg4"}[video.suffix]
            if not video.variable and not video.sound.lead:
                assert float(container.streams.video[0].average_rate) == pytest.approx(video.fps, rel=0.01)
            assert len(container.streams.audio) == (video.sound.kind != "absent")
            for stream in container.streams.audio:
                kinds.add((stream.codec_context.name, stream.codec_context.sample_rate, stream.codec_context.channels))
                assert stream.codec_context.name == video.sound.codec
                assert (stream.codec_context.sample_rate, stream.codec_context.channels) == (video.sound.rate, video.sound.channels)
    assert {rate for _, rate, _ in kinds} >= {8_000, 16_000, 44_100, 48_000} and {c for _, _, c in kinds} == {1, 2}


def test_rows_and_frames_differ_as_named(made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    for gotcha, extra in (("rows-plus-1", 1), ("rows-plus-2", 2), ("rows-minus-1", -1), ("rows-plus-6", 6), ("rows-minus-5", -5)):
        video, unit = by_gotcha[gotcha]
        assert len(read_labels(labels_of(made.out, unit))) - len(frame_timestamps(media_of(made.out, video))) == extra


def lag(heard: np.ndarray, voice: np.ndarray) -> tuple[float, float]:
    """Seconds by which `heard` comes after `voice` (both at 44.1 kHz), and the correlation there."""
    size = 1 << (len(heard) + len(voice)).bit_length()
    cross = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(voice, size)), size)
    best = int(np.argmax(cross))
    return (best if best < size // 2 else best - size) / 44_100, float(cross[best] / np.sqrt((heard**2).sum() * (voice**2).sum()))


@pytest.mark.parametrize("gotcha", ["missing-crops", "rows-plus-1", "rows-plus-2", "rows-minus-1", "audio-late", "audio-early", "short"])
def test_sound_lies_where_the_pictures_need_it(made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]], gotcha: str) -> None:
    video, unit = by_gotcha[gotcha]
    heard = read_audio(media_of(made.out, video))
    first = frame_timestamps(media_of(made.out, video))[0]
    times, cues = cues_of(0, video, unit)
    seconds = times[video.frames - 1] + 1 / video.fps + video.sound.lead
    voice = make_voice(0, unit.name, unit.identity, seconds, times + video.sound.lead, cues.voice).astype(float)
    voice[: round(video.sound.start * 44_100)] = 0  # was not recorded
    assert heard is not None and first == pytest.approx(video.sound.lead, abs=0.002)
    delay, correlation = lag(heard.astype(float), voice)
    assert abs(delay) < 0.002 and correlation > 0.9


def test_odd_sound(made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    def heard(gotcha: str) -> np.ndarray | None:
        return read_audio(media_of(made.out, by_gotcha[gotcha][0]))

    assert heard("no-audio") is None and heard("audio-empty") is None
    short = heard("audio-short")
    assert short is not None and len(short) / 44_100 == pytest.approx(60 / 30 / 3, abs=0.05)
    for gotcha in ("unreadable-media", "test-unreadable"):
        with pytest.raises(MediaError):
            heard(gotcha)
    steps = np.diff(frame_timestamps(media_of(made.out, by_gotcha["variable-rate"][0])))
    assert steps.max() > 2 * steps.min() > 0


def test_odd_label_files(made: FixtureReport, by_gotcha: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    def data(gotcha: str) -> bytes:
        return labels_of(made.out, by_gotcha[gotcha][1]).read_bytes()

    assert b"nan" in data("label-nan") and b"\r\n" in data("label-crlf") and not data("label-no-header").startswith(b"valence")
    assert len(read_labels(labels_of(made.out, by_gotcha["label-no-header"][1]))) == by_gotcha["label-no-header"][1].rows
    assert data("invalid-rows").count(b"-5,-5\n") == 12
    with pytest.raises(UserError, match="line 22"):
        read_labels(labels_of(made.out, by_gotcha["label-broken"][1]))
