"""The fixture's voice: babbled syllables whose loudness, pitch, rate and spectral tilt rise with arousal.

A pulse train (harmonics of the pitch) and breath noise are shaped, every 6 ms, by a moving set of
formants and by a tilt. Valence has a faint voice: a smile widens the vocal tract's resonances upwards.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from jmt_dist.affwild2.fixture_walk import Array, drift, stream

RATE = 44_100  # samples per second at which the voice is made
_FRAME, _HOP = 1024, 256
_HARMONICS = 48
_VOWELS = np.array([[750, 1250, 2600], [320, 2300, 3000], [340, 800, 2400], [520, 1850, 2600], [500, 950, 2500]], float)  # a i u e o, Hz
_WIDTHS = np.array([90.0, 130.0, 200.0])  # of the formants, Hz
_STEP = 441  # samples between points of the control curves: 10 ms


def _table() -> Array:
    phase = np.arange(4096) / 4096 * 2 * np.pi
    return np.asarray(sum(np.cos(k * phase) for k in range(1, _HARMONICS + 1))) / np.sqrt(_HARMONICS / 2)


def _syllables(rng: np.random.Generator, rate: Array) -> tuple[Array, Array]:
    """Loudness [C] in 0..1 and vowel weights [C, 5] at the control points, for syllable rates [C] per second."""
    phase = np.cumsum(rate) * _STEP / RATE + rng.random()
    number = phase.astype(int)
    accent = rng.uniform(0.6, 1.0, number[-1] + 2)
    pause = rng.random(number[-1] + 2) < 0.08
    loud = np.where(pause, 0.03, accent)[number] * (0.08 + 0.92 * np.sin(np.pi * (phase % 1.0)) ** 1.2)
    vowels = np.eye(len(_VOWELS))[rng.integers(0, len(_VOWELS), number[-1] + 3)]
    mix = np.clip((phase % 1.0 - 0.75) / 0.25, 0, 1)[:, None]
    return loud, vowels[number] * (1 - mix) + vowels[number + 1] * mix


def _envelope(vowels: Array, tract: Array, tilt: Array) -> Array:
    """Magnitude response [T, bins] of formants `vowels` [T, 5], scaled by `tract` [T], with `tilt` dB per octave [T]."""
    f = np.fft.rfftfreq(_FRAME, 1 / RATE)[None, :]
    centres = (vowels @ _VOWELS) * tract[:, None]
    gain = np.full((len(vowels), f.shape[1]), 0.02)
    for k, (strength, width) in enumerate(zip((1.0, 0.6, 0.35), _WIDTHS, strict=True)):
        gain += strength / (1 + ((f - centres[:, k : k + 1]) / width) ** 2)
    octaves = np.log2(np.maximum(f, 100.0) / 200.0)
    return gain * 10 ** (tilt[:, None] * octaves / 20) * (f > 60) * (f < 11_000)


def _shape(excitation: Array, response: Array) -> Array:
    """Filter `excitation` [S] with a response [T, bins] that changes every _HOP samples (overlap-add)."""
    window = np.sqrt(np.hanning(_FRAME + 1)[:-1])
    padded = np.pad(excitation, (_FRAME // 2, _FRAME + _HOP))
    frames = sliding_window_view(padded, _FRAME)[::_HOP][: len(response)]
    shaped = np.fft.irfft(np.fft.rfft(frames * window, axis=1) * response, axis=1) * (window / 2)  # Hann at a quarter adds up to 2
    out = np.zeros(len(shaped) * _HOP + _FRAME)
    for k in range(_FRAME // _HOP):
        part = shaped[:, k * _HOP : (k + 1) * _HOP].reshape(-1)
        out[k * _HOP : k * _HOP + len(part)] += part
    return out[_FRAME // 2 : _FRAME // 2 + len(excitation)]


def make_voice(seed: int, name: str, identity: int, seconds: float, times: Array, cues: Array) -> NDArray[np.float32]:
    """Voice [seconds * 44100] of person `identity`, for voice cues [N, 2] at `times` [N]; peaks stay within +-1."""
    who, rng = stream(seed, "voice", identity), stream(seed, name, "voice")
    base, tract_length = 2.0 ** who.uniform(-0.55, 0.75) * 150.0, who.uniform(0.88, 1.15)
    level, pace, tilt_rest, breath = who.normal(0, 1.5), who.uniform(0.9, 1.15), who.normal(0, 0.7), who.uniform(0.02, 0.08)
    samples = round(seconds * RATE)
    at = np.arange(samples // _STEP + 2) * _STEP / RATE
    valence, arousal = (np.interp(at, times, cues[:, k]) for k in range(2))

    loud, vowels = _syllables(rng, 3.6 * pace * 2.0 ** (0.55 * arousal))
    melody = 0.06 * drift(rng, at, 0.25) * (1 + 0.25 * valence)
    pitch = base * 2.0 ** (0.42 * arousal + melody)
    decibels = -3 + level + 8.0 * arousal

    grid = np.arange(samples) / _STEP
    control = np.arange(len(at))
    phase = np.cumsum(np.interp(grid, control, pitch)) / RATE + rng.random()
    pulses = np.interp((phase % 1.0) * 4096, np.arange(4097), np.append(table := _table(), table[0]))
    excitation = pulses + (breath * 2.0 ** (-0.3 * arousal) * 8.0)[np.minimum(grid.astype(int), len(at) - 1)] * rng.standard_normal(samples)

    steps = np.minimum(np.arange(samples // _HOP + 2) * _HOP // _STEP, len(at) - 1)
    tilt = -7.5 + tilt_rest + 2.2 * arousal
    voice = _shape(excitation, _envelope(vowels[steps], (tract_length * 1.07**valence)[steps], tilt[steps]))
    voice *= np.interp(grid, control, loud * 10 ** (decibels / 20))
    voice += 10 ** (who.uniform(-66, -54) / 20) * rng.standard_normal(samples)
    return np.tanh(voice).astype(np.float32)


def as_pcm(voice: NDArray[np.float32], rate: int, channels: int) -> NDArray[np.int16]:
    """PCM [S', channels] at `rate`; a second channel is the same voice, a little softer."""
    from math import gcd

    from scipy.signal import resample_poly

    if rate != RATE:
        divisor = gcd(rate, RATE)
        voice = resample_poly(voice, rate // divisor, RATE // divisor)
    sides = np.stack([voice * (1.0 if k == 0 else 0.8) for k in range(channels)], 1)
    return np.clip(np.rint(sides * 32767), -32768, 32767).astype(np.int16)
