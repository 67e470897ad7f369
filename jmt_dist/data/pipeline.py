"""Shards to clips and spectrograms: one DALI graph for CPU and GPU, training and dense (DESIGN section 7)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from jmt_dist.config import DataOptions
from jmt_dist.data.geometry import CLIP_FRAMES, CLIPS, OFFSETS, RATE, SIZE, STRIP, SUBSEQUENCE, WINDOW
from jmt_dist.data.shards import ShardSet
from jmt_dist.errors import UserError

# Kinetics-400 statistics that torchvision's R(2+1)D weights were trained with, on the 0..255 scale
MEAN = [255 * value for value in (0.43216, 0.394666, 0.37645)]
STD = [255 * value for value in (0.22803, 0.22145, 0.216989)]
# the log-mel definition of DESIGN section 7; the last two are the field's usual mean and deviation in dB
N_FFT, HANN, HOP, MELS, TOP_DB, MEL_MEAN, MEL_STD = 1024, 882, 441, 64, 80.0, -14.8, 19.895

Batch = dict[str, Tensor]


def log_mel(wave: Any) -> Any:
    """DALI node: one clip's samples [47040] to its normalised log-mel spectrogram [64, 107]."""
    from nvidia.dali import fn, types
    from nvidia.dali import math as dali_math

    # DALI's own default window is symmetric; the periodic one agrees with torchaudio and librosa (measured: 3e-4 dB)
    window = torch.hann_window(HANN, periodic=True, dtype=torch.float64).tolist()
    power = fn.spectrogram(wave, nfft=N_FFT, window_length=HANN, window_step=HOP, window_fn=window, power=2)
    mel = fn.mel_filter_bank(power, sample_rate=float(RATE), nfilter=MELS, mel_formula="htk", normalize=False)
    db = fn.to_decibels(mel, multiplier=10.0, reference=1.0, cutoff_db=-100.0)
    db = dali_math.max(db, fn.reductions.max(db) - TOP_DB)  # per clip, as the authors' code; cutoff_db alone is absolute
    return (fn.cast(db, dtype=types.FLOAT) - MEL_MEAN) / MEL_STD


def _frames(strips: Any, *, train: bool, q: Any, seed: int, crop: int, flip: bool, size: int, device: str, load: float) -> Any:
    """DALI node: a strip's bytes to normalised frames [64 or 71, size, size, 3]; one draw holds for all frames of a sample."""
    from nvidia.dali import fn, types

    extra: dict[str, Any] = (
        {"hw_decoder_load": load, "preallocate_width_hint": SIZE, "preallocate_height_hint": SIZE * STRIP} if device == "mixed" else {}
    )
    frames = fn.decoders.image(strips, device=device, output_type=types.RGB, **extra)
    frames = fn.reshape(frames, shape=[STRIP, SIZE, SIZE, 3], layout="FHWC")
    x = y = 0.5
    mirror: Any = 0
    side = crop if train else SIZE
    if train:
        frames = fn.slice(frames, q, SUBSEQUENCE, axes=[0])
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


def _graph(
    shards: ShardSet, *, train: bool, streams: Sequence[str], offsets: Sequence[int], rank: int, world: int, draw: int,
    size: int, crop: int, flip: bool, device: str, data: DataOptions,
) -> Any:  # fmt: skip
    """The outputs of the pipeline, in the order of `_names`."""
    from nvidia.dali import fn, types

    shuffle: dict[str, Any] = {"random_shuffle": True, "shuffle_after_epoch": True, "shuffle_after_epoch_seed": draw} if train else {}
    members: Any = fn.readers.webdataset(
        paths=[str(path) for path in shards.tars],
        index_paths=[str(path) for path in shards.indexes],
        ext=["strip.jpg", "audio.wav;audio.flac", "ends.i32", "va.f32", "id.i32"],
        dtypes=[types.UINT8, types.UINT8, types.INT32, types.FLOAT, types.INT32],
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
    strips, audio, ends, va, ident = members
    va = fn.reshape(va, shape=[SUBSEQUENCE, 2])  # raw members arrive flat
    own = draw + 1000 * (rank + 1)  # a seed of its own for each random op and rank: switching one off moves no other
    outputs = [ident]
    q: Any = None
    if train:
        q = fn.random.uniform(values=list(range(OFFSETS)), dtype=types.INT32, seed=own + 1)
        numbers = [q + OFFSETS * j for j in range(CLIPS)]  # n of ends[n]: the 8 clip ends of subsequence q
        va = fn.stack(*[fn.reshape(fn.slice(va, n, 1, axes=[0]), shape=[2]) for n in numbers])
        outputs += [va, q]
    else:
        numbers = [offset + OFFSETS * j for offset in offsets for j in range(CLIPS)]
        outputs += [va]
    if "visual" in streams:
        outputs.append(
            _frames(strips, train=train, q=q, seed=own, crop=crop, flip=flip, size=size, device=device, load=data.hw_decoder_load)
        )
    if "audio" in streams:
        pcm, _ = fn.decoders.audio(audio, dtype=types.FLOAT, downmix=True)
        pcm = pcm.gpu() if device == "mixed" else pcm

        def window(n: Any) -> Any:
            end = fn.reshape(fn.slice(ends, n, 1, axes=[0]), shape=[])
            return fn.slice(pcm, end - WINDOW, WINDOW, axes=[0])

        outputs.append(fn.stack(*[log_mel(window(n)) for n in numbers]))
    return tuple(outputs)


def _names(train: bool, streams: Sequence[str]) -> list[str]:
    names = ["id", "va", "q"] if train else ["id", "va"]
    return names + ["frames"] * ("visual" in streams) + ["mel"] * ("audio" in streams)


def clips(frames: Tensor, offset: int = 0) -> Tensor:
    """Frames [B, 64 or 71, S, S, 3] to the 8 clips [B, 8, 3, 8, S, S] of the subsequence at `offset`: a view, no copy.

    Flattened over its first two dimensions it is contiguous in torch's channels_last_3d format.
    """
    batch, _, height, width, channels = frames.shape
    part = frames[:, offset : offset + SUBSEQUENCE]
    return part.view(batch, CLIPS, CLIP_FRAMES, height, width, channels).permute(0, 1, 5, 2, 3, 4)


class ClipLoader:
    """Batches of decoded samples of one rank.

    Training batches (q drawn at random, the last batch filled up):
        id [B, 4] int32, va [B, 8, 2] (NaN = no label), q [B], frames [B, 64, S, S, 3], mel [B, 8, 64, 107]
    Dense batches (`offsets` given, nothing lost, nothing repeated, B may be smaller or 0 in the last):
        id [B, 4] int32, va [B, O, 8, 2], labels [B, 64, 2] (all end frames n = q + 8 j), frames [B, 71, S, S, 3], mel [B, O, 8, 64, 107]
    `clips` turns frames into the clips of a subsequence. Values are float32; frames are normalised.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        data: DataOptions,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        streams: Sequence[str] = ("visual", "audio"),
        offsets: Sequence[int] | None = None,
        size: int = SIZE,
        crop: int = SIZE,
        flip: bool = False,
        device: torch.device | None = None,
    ) -> None:
        if shards.samples < world:
            raise UserError(f"{shards.samples} samples are fewer than {world} ranks", f"Use at most {shards.samples} ranks.")
        self.shards, self.batch, self.world, self.rank = shards, batch, world, rank
        self.train, self.streams, self.offsets = offsets is None, tuple(streams), tuple(offsets or ())
        self.device = device or torch.device("cpu")
        self._options: dict[str, Any] = {
            "draw": seed, "size": size, "crop": crop, "flip": flip, "data": data,
            "device": "mixed" if self.device.type == "cuda" else "cpu",
        }  # fmt: skip
        self._restored: bytes | None = None
        self._iterator: Any = None
        # ranks take floor-divided shares padded to the largest, so every rank makes the same number of steps
        self.steps = math.ceil(math.ceil(shards.samples / world) / batch)

    def _build(self) -> Any:
        from nvidia.dali import pipeline_def
        from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

        pipeline = pipeline_def(enable_checkpointing=True)(_graph)(
            self.shards, train=self.train, streams=self.streams, offsets=self.offsets, rank=self.rank, world=self.world, **self._options,
            batch_size=self.batch, num_threads=self._options["data"].threads,
            prefetch_queue_depth=self._options["data"].prefetch, checkpoint=self._restored,
            device_id=self.device.index if self.device.type == "cuda" else None,
        )  # fmt: skip
        policy = LastBatchPolicy.FILL if self.train else LastBatchPolicy.PARTIAL
        return DALIGenericIterator(
            pipeline, _names(self.train, self.streams), reader_name="reader", auto_reset=True, last_batch_policy=policy
        )

    def _next(self) -> Batch:
        try:
            batch = next(self._iterator)[0]
        except StopIteration:  # the end of an epoch: auto_reset has begun the next one
            batch = next(self._iterator)[0]
        return {name: value.to(self.device) for name, value in batch.items()}

    def batches(self, epoch: int = 0, done: int = 0) -> Iterator[Batch]:
        """The rest of the current epoch after `done` steps; in training, call it once per epoch, in order."""
        if self._iterator is None or not self.train:
            self._iterator = self._build()
        if self.train:
            for _ in range(self.steps - done):
                batch = self._next()
                batch["q"] = batch["q"].flatten()
                yield batch
            return
        for found in self._iterator:
            batch = {name: value.to(self.device) for name, value in found[0].items()}
            if len(batch["id"]) == 0:
                continue
            yield self._dense(batch)

    def _dense(self, batch: Batch) -> Batch:
        count, offsets = len(batch["id"]), len(self.offsets)
        # row n = q + 8 j of the member, so [8 j, 8 q] transposed
        batch["labels"] = batch["va"]
        batch["va"] = batch["va"].view(count, CLIPS, OFFSETS, 2).transpose(1, 2)[:, list(self.offsets)]
        if "mel" in batch:
            batch["mel"] = batch["mel"].unflatten(1, (offsets, CLIPS))
        return batch

    def _identity(self) -> dict[str, Any]:
        return {"world": self.world, "batch": self.batch, "index_hash": self.shards.index_hash, "manifest_hash": self.shards.manifest_hash}

    def state(self) -> dict[str, Any]:
        """The loader's position after the batch last returned (about 4 kB), for `restore`."""
        pipeline = self._iterator.checkpoints()[0] if self._iterator is not None else None
        return {**self._identity(), "pipeline": pipeline}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. DALI itself would take another world's state in silence, so it is compared here."""
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise UserError(
                    f"the loader's state was saved with {key}={state[key]}, now {key}={mine}",
                    "Resume with the same ranks, batch, fold and shards.",
                )
        self._restored, self._iterator = state["pipeline"], None


def derive_seed(*parts: object) -> int:
    """A 31-bit seed for a named stream, so that no stream depends on how many numbers another draws."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little") & 0x7FFF_FFFF
