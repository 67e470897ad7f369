"""Shards to batches: one loader for training and dense prediction, on any number of ranks (DESIGN section 7)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from jmt_dist.config import DataOptions
from jmt_dist.data.geometry import CLIP_FRAMES, CLIPS, LABEL_BACK, OFFSETS, SIZE, SUBSEQUENCE
from jmt_dist.data.graph import graph, names
from jmt_dist.data.redivide import consumed, write_rest
from jmt_dist.data.shards import ShardSet
from jmt_dist.data.sound import spectrograms
from jmt_dist.errors import UserError

Batch = dict[str, Tensor]
SAME_JOB = {
    "world": "ranks", "rank": "rank", "batch": "batch", "buffer": "data.shuffle_buffer", "manifest_hash": "shards", "index_hash": "fold",
}  # fmt: skip


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
        label: Literal["end", "middle"] = "end",
        device: torch.device | None = None,
    ) -> None:
        if shards.samples < world:
            raise UserError(f"{shards.samples} samples are fewer than {world} ranks", f"Use at most {shards.samples} ranks.")
        self.shards, self.batch, self.world, self.rank = shards, batch, world, rank
        self.train, self.streams, self.offsets = offsets is None, tuple(streams), tuple(offsets or ())
        self.device = device or torch.device("cpu")
        self._options: dict[str, Any] = {
            "size": size, "crop": crop, "flip": flip, "data": data, "device": "mixed" if self.device.type == "cuda" else "cpu",
        }  # fmt: skip
        self.steps = self._steps(shards.samples)
        self.epoch = self.done = 0  # where training is: this epoch, after so many of its steps
        self._draw, self._back = seed, LABEL_BACK[label]
        self._seen: list[Tensor] = []  # samples of the batches of this epoch
        self._before = torch.empty(0, 3, dtype=torch.int32)  # samples of this epoch that another number of ranks has had
        self._restored: bytes | None = None
        self._iterator: Any = None
        self._folder: TemporaryDirectory[str] | None = None

    def _steps(self, samples: int) -> int:
        """Steps of one pass: ranks take floor-divided shares padded to the largest, so every rank makes the same number."""
        return math.ceil(math.ceil(samples / self.world) / self.batch)

    def _build(self) -> Any:
        from nvidia.dali import pipeline_def
        from nvidia.dali.plugin.pytorch import DALIRaggedIterator, LastBatchPolicy

        shards, draw = self.shards, self._draw
        if len(self._before):
            self._folder = TemporaryDirectory(prefix="jmt-rest-")
            shards = write_rest(shards, self._before, self.world, Path(self._folder.name))
            draw = derive_seed("rest", draw)  # not the crops of the epoch after it
        pipeline = pipeline_def(enable_checkpointing=True)(graph)(
            shards, train=self.train, streams=self.streams, offsets=self.offsets, rank=self.rank, world=self.world, draw=draw,
            **self._options, batch_size=self.batch, num_threads=self._options["data"].threads,
            prefetch_queue_depth=self._options["data"].prefetch, checkpoint=self._restored,
            device_id=self.device.index if self.device.type == "cuda" else None,
        )  # fmt: skip
        policy = LastBatchPolicy.FILL if self.train else LastBatchPolicy.PARTIAL
        outputs = names(self.train, self.streams, self._options["device"])
        # both kinds are views of what DALI made: no copy
        kinds = [DALIRaggedIterator.SPARSE_LIST_TAG if name == "pcm" else DALIRaggedIterator.DENSE_TAG for name in outputs]
        return DALIRaggedIterator(pipeline, outputs, output_types=kinds, reader_name="reader", auto_reset=True, last_batch_policy=policy)

    def batches(self, epoch: int = 0, done: int = 0) -> Iterator[Batch]:
        """Training: the steps of `epoch` after the first `done`. Dense: all samples of this rank.

        Training goes forward only: steps between `self.epoch`, `self.done` and the place asked for are read and dropped.
        """
        if not self.train:
            yield from self._pass()
            return
        passed_over = (epoch - self.epoch) * self.steps + done - self.done
        if passed_over < 0:
            raise ValueError(f"step {done} of epoch {epoch} is over: the loader is after step {self.done} of epoch {self.epoch}")
        for _ in range(passed_over):
            self._step()
        while self.epoch == epoch:
            yield self._step()

    def _step(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._build()
        try:
            batch = next(self._iterator)[0]
        except StopIteration:  # the end of an epoch: auto_reset has begun the next one
            batch = next(self._iterator)[0]
        self._seen.append(batch["id"][:, :3].clone())
        self.done += 1
        if self.done == self.steps:
            self.epoch, self.done, self._seen = self.epoch + 1, 0, []
            if len(self._before):  # the rest of a re-divided epoch is over, whole epochs follow
                self._forget()
                self._before = self._before[:0]
        batch["q"] = batch["q"].flatten()
        numbers = batch["q"][:, None] + OFFSETS * torch.arange(CLIPS, device=batch["q"].device)
        batch["va"] = self._labels(batch["va"])[torch.arange(len(numbers), device=numbers.device)[:, None], numbers]
        if "pcm" in batch:
            batch["mel"] = spectrograms(batch.pop("pcm"), batch.pop("ends").gather(1, numbers))
        return {name: value.to(self.device) for name, value in batch.items()}

    def _forget(self) -> None:
        self._iterator = self._restored = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _pass(self) -> Iterator[Batch]:
        for found in self._build():
            batch = found[0]
            if len(batch["id"]):  # a rank whose share is smaller may get an empty last batch
                if "pcm" in batch:
                    numbers = [offset + OFFSETS * j for offset in self.offsets for j in range(CLIPS)]
                    batch["mel"] = spectrograms(batch.pop("pcm"), batch.pop("ends")[:, numbers])
                yield self._dense({name: value.to(self.device) for name, value in batch.items()})

    def _dense(self, batch: Batch) -> Batch:
        count, offsets = len(batch["id"]), len(self.offsets)
        # row n = q + 8 j of the member, so [8 j, 8 q] transposed
        batch["labels"] = batch["va"]
        batch["va"] = self._labels(batch["va"]).view(count, CLIPS, OFFSETS, 2).transpose(1, 2)[:, list(self.offsets)]
        if "mel" in batch:
            batch["mel"] = batch["mel"].unflatten(1, (offsets, CLIPS))
        return batch

    def _labels(self, va: Tensor) -> Tensor:
        """Labels [B, 64, 2] of the clips n, from those of their end frames; none where that frame lies before the first end."""
        if self._back == 0:
            return va
        return torch.cat([torch.full_like(va[:, : self._back], math.nan), va[:, : -self._back]], dim=1)

    def _job(self) -> dict[str, Any]:
        hashes = {"manifest_hash": self.shards.manifest_hash, "index_hash": self.shards.index_hash}
        return {"world": self.world, "rank": self.rank, "batch": self.batch, "buffer": self._options["data"].shuffle_buffer, **hashes}

    def _require(self, state: dict[str, Any], keys: Sequence[str]) -> None:
        job = self._job()
        for key in keys:
            if key == "buffer" and key not in state:
                continue  # a state from before it was kept
            if state.get(key) != job[key]:
                theirs, mine = (str(value)[:12] for value in (state.get(key), job[key]))
                what = SAME_JOB[key]
                raise UserError(
                    f"the loader's state was saved with {what} {theirs}, this job has {what} {mine}",
                    "Resume with the same number of ranks, batch, shuffle buffer, fold and shards.",
                )

    def state(self) -> dict[str, Any]:
        """The training position after the batch last returned, for `restore` and `redivide`.

        Some kilobytes, and 12 bytes for each sample this rank has had in the epoch.
        """
        pipeline = self._iterator.checkpoints()[0] if self._iterator is not None else self._restored
        position = {"epoch": self.epoch, "done": self.done, "draw": self._draw}
        seen = torch.cat([self._before[:0], *self._seen])
        return {**self._job(), **position, "before": self._before, "seen": seen, "pipeline": pipeline}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly where this rank's `state` was taken; `self.epoch` and `self.done` say where that is.

        Raises UserError where it is of another world size, rank, batch, shuffle buffer, shard set or fold: DALI itself would take it in
        silence, and lose samples and repeat others (with another buffer, a quarter of a small epoch).
        """
        self._require(state, tuple(SAME_JOB))
        self._forget()
        self.epoch, self.done, self._draw = state["epoch"], state["done"], state["draw"]
        self._before, self._seen, self._restored = state["before"], [state["seen"]], state["pipeline"]

    def redivide(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue the epoch in which a job of another number of ranks (or another batch) stopped, given the states of all its ranks.

        What that job has not had of its epoch is divided over this loader's ranks: none lost, none twice but for the padding of
        the last batch; whole epochs follow, in an order of their own. Afterwards `self.epoch` and `self.done` say where training
        goes on, in steps of this loader: `batches(self.epoch, self.done)`. Where ranks x batch is what it was, `self.done` is too.
        Raises UserError: a rank's state is missing, the states are not of one step, or of another shard set or fold.
        """
        for state in states:
            self._require(state, ("manifest_hash", "index_hash"))
        had = consumed(states)
        self._forget()
        self.epoch, self._before, self._seen = states[0]["epoch"], had, []
        left = self.shards.samples - len(had)
        self.done = self.steps - self._steps(max(left, self.world)) if len(had) else 0
        self._draw = derive_seed("redivided", states[0]["draw"], self.epoch, states[0]["done"])


def derive_seed(*parts: object) -> int:
    """A 31-bit seed for a named stream, so that no stream depends on how many numbers another draws."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little") & 0x7FFF_FFFF
