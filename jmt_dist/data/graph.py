"""The DALI graph that turns a sample's members into frames and spectrograms, on CPU and GPU (DESIGN section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jmt_dist.config import DataOptions
from jmt_dist.data.geometry import CLIPS, MEAN, OFFSETS, RATE, SIZE, STD, STRIP, SUBSEQUENCE, WINDOW
from jmt_dist.data.shards import ShardSet
from jmt_dist.data.sound import HANN, HOP, MEL_MEAN, MEL_STD, MELS, N_FFT, TOP_DB


def log_mel(wave: Any) -> Any:
    """DALI node: one clip's samples [47040] to its normalised log-mel spectrogram [64, 107]; on the CPU `sound` is faster.

    Equal to librosa's (HTK, no norm) to 1e-3 dB within 60 dB of the clip's peak and 1e-2 below; but a cell that holds hardly more
    than one bin at the edge of its filter, as in a pure sweep, may differ by up to 1e-2 dB: DALI's filter weights are off by 5e-6.
    """
    from nvidia.dali import fn, types
    from nvidia.dali import math as dali_math

    # DALI's own default window is symmetric; the periodic one agrees with torchaudio and librosa (measured: 3e-4 dB)
    window = torch.hann_window(HANN, periodic=True, dtype=torch.float64).tolist()
    power = fn.spectrogram(wave, nfft=N_FFT, window_length=HANN, window_step=HOP, window_fn=window, power=2)
    mel = fn.mel_filter_bank(power, sample_rate=float(RATE), nfilter=MELS, mel_formula="htk", normalize=False)
    db = fn.to_decibels(mel, multiplier=10.0, reference=1.0, cutoff_db=-100.0)
    db = dali_math.max(db, fn.reductions.max(db) - TOP_DB)  # per clip, as the authors' code; cutoff_db alone is absolute
    return (fn.cast(db, dtype=types.FLOAT) - MEL_MEAN) / MEL_STD


def clip_frames(strips: Any, *, train: bool, q: Any, seed: int, crop: int, flip: bool, size: int, device: str, load: float) -> Any:
    """DALI node: a strip's bytes to normalised frames [64 or 71, size, size, 3]; one draw holds for all frames of a sample."""
    from nvidia.dali import fn, types

    if train and device == "cpu":  # the wanted rows alone: saves a tenth of the decoding and a copy
        rows = {"start": fn.reshape(q * SIZE, shape=[1]), "shape": [SUBSEQUENCE * SIZE], "axes": [0]}
        frames = fn.decoders.image_slice(strips, output_type=types.RGB, **rows)
        frames = fn.reshape(frames, shape=[SUBSEQUENCE, SIZE, SIZE, 3], layout="FHWC")
    else:
        hints = {"preallocate_width_hint": SIZE, "preallocate_height_hint": SIZE * STRIP}
        extra: dict[str, Any] = {"hw_decoder_load": load, **hints} if device == "mixed" else {}
        frames = fn.decoders.image(strips, device=device, output_type=types.RGB, **extra)
        frames = fn.reshape(frames, shape=[STRIP, SIZE, SIZE, 3], layout="FHWC")
        frames = fn.slice(frames, q, SUBSEQUENCE, axes=[0]) if train else frames
    x = y = 0.5
    mirror: Any = 0
    side = crop if train else SIZE
    if train:
        x, y = fn.random.uniform(range=[0.0, 1.0], seed=seed + 3), fn.random.uniform(range=[0.0, 1.0], seed=seed + 4)
        mirror = fn.random.coin_flip(probability=0.5 if flip else 0.0, dtype=types.INT32, seed=seed + 2)
    frames = fn.crop_mirror_normalize(
        frames,
        crop=(side, side),
        crop_pos_x=x,
        crop_pos_y=y,
        mirror=mirror,
        mean=MEAN,
        std=STD,
        dtype=types.FLOAT,
        output_layout="FHWC",
    )
    return frames if side == size else fn.resize(frames, size=[size, size])


def graph(
    shards: ShardSet, *, train: bool, streams: Sequence[str], offsets: Sequence[int], rank: int, world: int, draw: int,
    size: int, crop: int, flip: bool, device: str, data: DataOptions,
) -> Any:  # fmt: skip
    """The outputs of the pipeline, in the order of `names`."""
    from nvidia.dali import fn, types

    shuffle: dict[str, Any] = {"random_shuffle": True, "shuffle_after_epoch": True, "shuffle_after_epoch_seed": draw} if train else {}
    wanted = {"id.i32": types.INT32, "va.f32": types.FLOAT}  # other members are not read: sound is most of a sample's bytes
    if "visual" in streams:
        wanted |= {"strip.jpg": types.UINT8}
    if "audio" in streams:
        wanted |= {"audio.wav;audio.flac": types.UINT8, "ends.i32": types.INT32}
    members: Any = fn.readers.webdataset(
        paths=[str(path) for path in shards.tars],
        index_paths=[str(path) for path in shards.indexes],
        ext=list(wanted),
        dtypes=list(wanted.values()),
        name="reader",
        seed=draw,  # equal on all ranks: the ranks divide one common order
        shard_id=rank,
        num_shards=world,
        pad_last_batch=True,  # without it samples are lost and repeated from the second epoch on (measured)
        missing_component_behavior="error",
        initial_fill=data.shuffle_buffer,
        dont_use_mmap=not data.mmap,
        **shuffle,
    )
    ident, va, *streamed = members
    va = fn.reshape(va, shape=[SUBSEQUENCE, 2])  # raw members arrive flat
    own = draw + 1000 * (rank + 1)  # a seed of its own for each random op and rank: switching one off moves no other
    outputs = [ident]
    q: Any = None
    if train:
        q = fn.random.uniform(values=list(range(OFFSETS)), dtype=types.INT32, seed=own + 1)
        numbers = [q + OFFSETS * j for j in range(CLIPS)]  # n of ends[n]: the 8 clip ends of subsequence q
        outputs += [va, q]
    else:
        numbers = [offset + OFFSETS * j for offset in offsets for j in range(CLIPS)]
        outputs += [va]
    if "visual" in streams:
        outputs.append(
            clip_frames(
                streamed.pop(0), train=train, q=q, seed=own, crop=crop, flip=flip, size=size, device=device, load=data.hw_decoder_load
            )
        )
    if "audio" in streams:
        audio, ends = streamed
        if device == "cpu":  # spectrograms are made of these by torch, see `sound`
            return *outputs, fn.decoders.audio(audio, dtype=types.INT16, downmix=True)[0], ends
        pcm = fn.decoders.audio(audio, dtype=types.FLOAT, downmix=True)[0].gpu()

        def window(n: Any) -> Any:
            end = fn.reshape(fn.slice(ends, n, 1, axes=[0]), shape=[])
            return fn.slice(pcm, end - WINDOW, WINDOW, axes=[0])

        outputs.append(fn.stack(*[log_mel(window(n)) for n in numbers]))
    return tuple(outputs)


def names(train: bool, streams: Sequence[str], device: str) -> list[str]:
    """What the outputs of `graph` are called; `pcm` differs in length from sample to sample."""
    labels = ["id", "va", "q"] if train else ["id", "va"]
    sound = ["pcm", "ends"] if device == "cpu" else ["mel"]
    return labels + ["frames"] * ("visual" in streams) + sound * ("audio" in streams)
