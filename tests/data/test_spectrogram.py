"""The graph's log-mel spectrograms against librosa, on voices, tones, bursts and silence."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from scipy.signal import chirp, lfilter

from jmt_dist.config import DataOptions
from jmt_dist.data.geometry import RATE, WINDOW
from jmt_dist.data.graph import log_mel
from jmt_dist.data.pipeline import ClipLoader
from jmt_dist.data.sample import encode_audio
from jmt_dist.data.shards import ShardSet
from jmt_dist.data.sound import MEL_MEAN, MEL_STD, MELS, N_FFT, _bank

from .tiny import tiny_sample, write_tiny

Sound = NDArray[np.float64]
ENDS = (WINDOW + 5880 * np.arange(64)).astype(np.int32)  # 4 frames at 30 per second
LENGTH = int(ENDS[-1])
TIME = np.arange(LENGTH) / RATE
OFFSETS = [0, 3]
# DALI computes the corners of its filters in single precision, so weights are off by up to 5e-6. That shows where one bin at the
# very edge of a filter is all that a cell holds: in a sweep about one cell in a hundred differs by 5e-3 dB
WITHIN = {"dali": {"glide": 0.985}, "torch": {}}


def voice(rng: np.random.Generator) -> Sound:
    """Glottal pulses of gliding pitch through three formants, syllables with pauses of digital silence, a little breath."""
    pitch = 140 + 60 * np.sin(2 * np.pi * 0.4 * TIME)
    pulses = (np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0) > 0).astype(np.float64) + 0.01 * rng.standard_normal(LENGTH)
    for formant, width in ((650, 80), (1_150, 90), (2_600, 150)):
        radius = np.exp(-np.pi * width / RATE)
        pulses = lfilter([1.0], [1, -2 * radius * np.cos(2 * np.pi * formant / RATE), radius**2], pulses)
    syllables = np.clip(np.sin(2 * np.pi * 1.7 * TIME), 0, None)
    return 0.5 * pulses * syllables / np.abs(pulses).max()


@cache
def sounds() -> dict[str, Sound]:
    """Full scale is 1."""
    rng = np.random.default_rng(4)
    click = np.zeros(LENGTH)
    click[::30_000] = 0.9
    fading = 10.0 ** (-4 * TIME / TIME[-1])  # from full scale to 80 dB below
    return {
        "voice": voice(rng),
        "quiet voice": voice(rng) / 300,
        "tone": 0.99 * np.sin(2 * np.pi * 440 * TIME),
        "tones 40 dB apart": 0.9 * np.sin(2 * np.pi * 1_000 * TIME) + 0.009 * np.sin(2 * np.pi * 5_000 * TIME),
        "glide": 0.7 * chirp(TIME, 60, TIME[-1], 16_000),
        "noise": 0.2 * rng.standard_normal(LENGTH),
        "fading noise": 0.3 * fading * rng.standard_normal(LENGTH),
        "clipped": np.sign(np.sin(2 * np.pi * 150 * TIME)),
        "clicks": click,
        "one bit": rng.integers(-1, 2, LENGTH) / 32_768,
        "direct current": np.full(LENGTH, 0.3),
        "silence": np.zeros(LENGTH),
    }


def pcm16(sound: Sound) -> NDArray[np.int16]:
    return np.clip(np.round(sound * 32_767), -32_768, 32_767).astype(np.int16)


def librosa_db(pcm: NDArray[np.int16], ends: NDArray[np.int32]) -> Sound:
    """[len(ends), 64, 107] in dB, 80 dB deep in each clip; in double precision."""
    windows = np.stack([pcm[end - WINDOW : end] for end in ends]).astype(np.float64) / 32_768
    power = librosa.feature.melspectrogram(
        y=windows, sr=RATE, n_fft=1024, win_length=882, hop_length=441, n_mels=64, htk=True, norm=None, center=True, pad_mode="reflect"
    )
    db = 10 * np.log10(np.maximum(power, 1e-10))
    return np.maximum(db, db.max(axis=(1, 2), keepdims=True) - 80)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return sound_shards(tmp_path_factory.mktemp("sounds"))


def sound_shards(folder: Path) -> ShardSet:
    made = [tiny_sample((k, 0, 0), encode_audio(pcm16(sound), "wav"), ENDS) for k, sound in enumerate(sounds().values())]
    return write_tiny(folder / "shards", [len(made)], made)


def require_equal(found: NDArray[np.float32], name: str, q: int, by: str) -> None:
    """`found` [8, 64, 107] against librosa for the clips of a sound at offset q, as DESIGN section 7 promises."""
    wanted, decibels = librosa_db(pcm16(sounds()[name]), ENDS[q::8]), found.astype(np.float64) * MEL_STD + MEL_MEAN
    near = wanted > wanted.max(axis=(1, 2), keepdims=True) - 60
    difference = np.abs(decibels - wanted)
    assert found.shape == (8, 64, 107)
    assert np.quantile(difference[near], WITHIN[by].get(name, 1.0)) < 1e-3, name
    assert difference.max() < 1e-2, name


def test_every_sound_is_librosa_s(shards: ShardSet) -> None:
    """What loaders on the CPU deliver."""
    named = dict(enumerate(sounds()))
    for batch in ClipLoader(shards, data=DataOptions(threads=2), batch=5, streams=("audio",), offsets=OFFSETS).batches():
        for unit, mel in zip(batch["id"][:, 0].tolist(), batch["mel"], strict=True):
            name = named.pop(unit)
            for place, q in enumerate(OFFSETS):
                require_equal(mel[place].numpy(), name, q, "torch")
    assert not named


def test_every_sound_is_librosa_s_by_dali_too() -> None:
    """What loaders on a GPU deliver, here on the CPU."""
    windows = [pcm16(sound)[end - WINDOW : end] / np.float32(32_768) for sound in sounds().values() for end in ENDS[3::8]]

    @pipeline_def(batch_size=len(windows), num_threads=2, device_id=None)
    def graph() -> Any:
        return log_mel(fn.external_source(source=lambda: windows))

    pipe = graph()
    pipe.build()
    found = pipe.run()[0].as_array().reshape(-1, 8, 64, 107)
    for mel, name in zip(found, sounds(), strict=True):
        require_equal(mel, name, 3, "dali")


def test_the_filters_are_librosa_s() -> None:
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def weights() -> Any:
        unit = fn.external_source(source=lambda: [np.eye(513, dtype=np.float32)], layout="ft")
        return fn.mel_filter_bank(unit, sample_rate=float(RATE), nfilter=MELS, mel_formula="htk", normalize=False)

    pipe = weights()
    pipe.build()
    wanted = librosa.filters.mel(sr=RATE, n_fft=N_FFT, n_mels=MELS, htk=True, norm=None, dtype=np.float64)
    assert np.abs(pipe.run()[0].at(0) - wanted).max() < 6e-6  # to single precision of its corners
    assert np.abs(_bank().numpy() - wanted).max() < 1e-7


def test_the_sounds_try_all_of_the_scale() -> None:
    levels = {name: librosa_db(pcm16(sound), ENDS[:1]) for name, sound in sounds().items()}
    assert levels["silence"].min() == levels["silence"].max() == -100
    for name in ("voice", "tone", "glide", "clicks"):
        assert np.ptp(levels[name]) > 79  # down to the floor of 80 dB
    assert levels["clipped"].max() > 30 > -45 > levels["one bit"].max()
