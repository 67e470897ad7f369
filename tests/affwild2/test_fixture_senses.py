"""Drawn faces and made voices: what they show must be readable in people not seen before, and vary between people."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from jmt_dist.affwild2.fixture_face import make_identity, render_blocks
from jmt_dist.affwild2.fixture_voice import RATE, as_pcm, make_voice
from jmt_dist.affwild2.fixture_walk import drift

PEOPLE, FRAMES = 20, 24


def faces(identity: int, cues: np.ndarray) -> np.ndarray:
    # far apart in time, so that pose and talk differ from frame to frame
    return np.concatenate(list(render_blocks(0, f"u{identity}", make_identity(0, identity), np.arange(len(cues)) * 2.0, cues)))


@pytest.fixture(scope="module")
def crowd() -> tuple[np.ndarray, np.ndarray]:
    """Cues [P, F, 2] and faces [P, F, 112, 112, 3] of 20 people."""
    cues = np.random.default_rng(0).uniform(-1.5, 1.5, (PEOPLE, FRAMES, 2))
    return cues, np.stack([faces(k, cues[k]) for k in range(PEOPLE)])


def small(crowd_faces: np.ndarray, side: int) -> np.ndarray:
    flat = crowd_faces.reshape(-1, 112, 112, 3)
    return np.stack([np.asarray(Image.fromarray(f).resize((side, side), Image.Resampling.BILINEAR), np.float64) / 255 for f in flat])


def read_from_others(X: np.ndarray, y: np.ndarray) -> float:
    """Correlation of a ridge regression's predictions, each person predicted from the others."""
    X = np.c_[X.reshape(len(X), -1), np.ones(len(X))]
    who = np.repeat(np.arange(PEOPLE), FRAMES)
    predicted = np.empty(len(y))
    for fold in range(4):
        test = who % 4 == fold
        A = X[~test]
        weights = A.T @ np.linalg.solve(A @ A.T + 3.0 * np.eye(len(A)), y[~test])
        predicted[test] = X[test] @ weights
    return float(np.corrcoef(predicted, y)[0, 1])


def test_valence_is_readable_in_unseen_faces_at_32_pixels(crowd: tuple[np.ndarray, np.ndarray]) -> None:
    cues, pictures = crowd
    X = small(pictures, 32)
    assert read_from_others(X, cues[..., 0].ravel()) > 0.7
    assert read_from_others(X[:, 20:], cues[..., 0].ravel()) > 0.8  # the mouth alone
    assert read_from_others(X[:, :18], cues[..., 0].ravel()) > 0.5  # brows, eyes and cheeks alone
    shuffled = np.random.default_rng(1).permutation(cues[..., 0].ravel())
    assert read_from_others(X, shuffled) < 0.3


def test_eyes_open_with_arousal() -> None:
    for identity in range(6):
        cues = np.stack([np.zeros(32), np.repeat([-2.0, 2.0], 16)], 1)
        blue = faces(identity, cues)[:, 35:62, 20:92, 2].astype(float)  # the white of the eye is the bluest part of a face
        white = (blue > np.median(blue) + 35).mean((1, 2))
        assert np.median(white[16:]) > 1.3 * np.median(white[:16]) > 0


def test_people_look_different_and_move(crowd: tuple[np.ndarray, np.ndarray]) -> None:
    means = crowd[1].astype(float).mean(1).reshape(PEOPLE, -1)
    between = np.abs(means[:, None] - means[None]).mean(-1)[~np.eye(PEOPLE, dtype=bool)]
    assert between.min() > 6  # grey levels of 255, for the two most alike
    assert np.abs(np.diff(crowd[1][0].astype(float), axis=0)).mean((1, 2, 3)).min() > 1
    tones = sorted(make_identity(0, k).skin.mean() for k in range(24))
    assert tones[-1] - tones[0] > 0.35


def test_the_same_options_draw_the_same_pixels() -> None:
    cues = np.zeros((9, 2))
    assert np.array_equal(faces(3, cues), faces(3, cues))
    assert not np.array_equal(faces(3, cues), faces(4, cues))


# ---- voices


def speak(identity: int, valence: float, arousal: float, seconds: float = 6.0) -> np.ndarray:
    times = np.arange(0, seconds, 1 / 30)
    cues = np.stack([np.full(len(times), valence), np.full(len(times), arousal)], 1)
    return make_voice(0, f"u{identity}", identity, seconds, times, cues).astype(np.float64)


def decibels(voice: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(voice**2)))


def pitch(voice: np.ndarray) -> float:
    """Median pitch in Hz of the louder frames, by autocorrelation."""
    frames = voice[: len(voice) // 4096 * 4096].reshape(-1, 4096)
    loud = frames[np.argsort((frames**2).mean(1))[-len(frames) // 3 :]]
    found = []
    for frame in loud:
        spectrum = np.fft.rfft(frame * np.hanning(4096), 16384)
        auto = np.fft.irfft(np.abs(spectrum) ** 2)
        low, high = RATE // 600, RATE // 60
        found.append(RATE / (low + int(np.argmax(auto[low:high]))))
    return float(np.median(found))


def brightness(voice: np.ndarray) -> float:
    """Decibels of 2-8 kHz against 100-1000 Hz."""
    power, f = np.abs(np.fft.rfft(voice)) ** 2, np.fft.rfftfreq(len(voice), 1 / RATE)
    return float(10 * np.log10(power[(f > 2000) & (f < 8000)].sum() / power[(f > 100) & (f < 1000)].sum()))


def syllable_rate(voice: np.ndarray) -> float:
    """Mean frequency in Hz of the loudness curve, 1.5-15 Hz."""
    loud = np.sqrt((voice[: len(voice) // 441 * 441].reshape(-1, 441) ** 2).mean(1))
    power, f = np.abs(np.fft.rfft((loud - loud.mean()) * np.hanning(len(loud)))) ** 2, np.fft.rfftfreq(len(loud), 0.01)
    band = (f > 1.5) & (f < 15)
    return float((power * f)[band].sum() / power[band].sum())


@pytest.mark.parametrize("identity", [0, 1, 5, 9])
def test_arousal_is_loud_high_fast_and_bright(identity: int) -> None:
    calm, excited = speak(identity, 0, -1.3), speak(identity, 0, 1.3)
    assert decibels(excited) - decibels(calm) > 15
    assert pitch(excited) > 1.5 * pitch(calm)
    assert brightness(excited) > brightness(calm) + 2
    assert syllable_rate(excited) > 1.3 * syllable_rate(calm)
    assert np.abs(excited).max() <= 1


def test_voices_differ_between_people_but_arousal_decides_loudness() -> None:
    voices = {a: [decibels(speak(k, 0, a, 3.0)) for k in range(8)] for a in (-1.0, 0.0, 1.0)}
    assert max(voices[-1.0]) < min(voices[0.0]) + 2 and max(voices[0.0]) < min(voices[1.0]) + 2
    assert np.std(voices[0.0]) > 0.5
    pitches = [pitch(speak(k, 0, 0, 3.0)) for k in range(8)]
    assert max(pitches) > 1.4 * min(pitches)


def test_the_voice_follows_its_cue_in_time() -> None:
    times = np.arange(0, 20, 1 / 30)
    arousal = drift(np.random.default_rng(5), times, 1.0)
    voice = make_voice(0, "u", 2, 20.0, times, np.stack([0 * arousal, arousal], 1)).astype(float)
    step = RATE // 2
    loud = [decibels(voice[k : k + step]) for k in range(0, len(voice) - step, step)]
    cue = np.interp((np.arange(len(loud)) + 0.5) * 0.5, times, arousal)
    assert np.corrcoef(loud, cue)[0, 1] > 0.85


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 1), (48_000, 2), (16_000, 1), (8_000, 2)])
def test_pcm_keeps_length_and_level(rate: int, channels: int) -> None:
    voice = speak(1, 0, 0, 2.0).astype(np.float32)
    pcm = as_pcm(voice, rate, channels)
    assert pcm.dtype == np.int16 and pcm.shape == (2 * rate, channels)
    assert decibels(pcm[:, 0] / 32768) == pytest.approx(decibels(voice), abs=1.0)
