"""The features stage: what the frozen backbones say of every sample, stored for the fusion (paper, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from jmt_dist.data.feature_tars import FeatureWriter, stored_samples, write_description
from jmt_dist.data.pipeline import Batch, ClipLoader, clips
from jmt_dist.data.redivide import write_rest
from jmt_dist.errors import UserError
from jmt_dist.model.heads import AudioModel, VisualModel
from jmt_dist.train import stop
from jmt_dist.train.engine import autocast
from jmt_dist.train.plan import FoldPlan, claim
from jmt_dist.train.ranks import any_rank, apart, barrier, from_first, rank, world
from jmt_dist.train.stage import finished, write_json
from jmt_dist.train.stored import damage_of_features, note_backbones, require_own
from jmt_dist.train.weights import load_weights

SAMPLES = 256  # per tar: a job that is killed loses at most so many of each rank


def trained_backbones(plan: FoldPlan) -> tuple[VisualModel, AudioModel]:
    """The models of the visual and the audio stage with their best weights."""
    visual, audio = VisualModel(plan.recipe.visual), AudioModel(plan.recipe.audio)
    load_weights(visual, plan.folder / "visual" / "best.safetensors")
    load_weights(audio, plan.folder / "audio" / "best.safetensors")
    return visual, audio


def extract(plan: FoldPlan) -> None:
    """Write the features of all parts of the fold, unless that is done and they are whole."""
    folder, key = plan.folder / "features", plan.key("features")
    if not already_whole(plan, folder, key, plan.parts):
        claim(folder, key)
        visual, audio = trained_backbones(plan)
        write_features(plan, folder, key, visual.backbone, audio.backbone, plan.parts)


def already_whole(plan: FoldPlan, folder: Path, key: str, parts: Iterable[str]) -> bool:
    """Whether features are done with this key and as they were stored; where they are not, they count as unfinished. Collective."""
    if not from_first(finished(folder, key) is not None if rank() == 0 else None):
        return False
    require_own(plan, folder)
    damaged = damage_of_features(plan, folder, parts)
    if damaged and rank() == 0:
        print(f"{damaged}: what is not stored whole is computed now", flush=True)
        (folder / "done.json").unlink()  # only its tars that are whole are gone on with
    return not damaged


def write_features(plan: FoldPlan, folder: Path, key: str, visual: nn.Module, audio: nn.Module, parts: Iterable[str]) -> None:
    """Write what two backbones say of `parts` to a claimed folder. Collective.

    A job that was stopped or killed, of whatever number of ranks, is gone on with: samples whose tar is there are not computed
    again. Raises Stopped after the tars begun are published, and UserError where those that are there are of other backbones.
    """
    require_own(plan, folder)
    note_backbones(plan, folder)
    visual, audio = visual.to(plan.device).eval(), audio.to(plan.device).eval()
    counts = {part: _part(plan, folder, part, visual, audio) for part in parts}
    if rank() == 0:
        write_description(folder, plan.recipe.features.offsets, plan.recipe.features.dtype)
        write_json(folder / "done.json", {"key": key, "samples": counts})
    barrier()


@torch.no_grad()
def _part(plan: FoldPlan, folder: Path, part: str, visual: nn.Module, audio: nn.Module) -> int:
    """One part; returns the number of samples all ranks wrote, which must be all there are."""
    options, shards = plan.recipe.features, plan.parts[part]
    had = _had(plan, folder, part)
    if len(had) < shards.samples:
        with TemporaryDirectory(prefix="jmt-rest-") as rest:
            left = write_rest(shards, had, world(), Path(rest)) if len(had) else shards
            loader = ClipLoader(
                left, data=plan.recipe.data, batch=options.batch, rank=rank(), world=world(), offsets=options.offsets,
                size=plan.recipe.visual.size, device=plan.device,
            )  # fmt: skip
            _write(plan, loader, Tars(plan, folder, part, len(had)), visual, audio, -(-shards.samples // world()))
        barrier()
        had = _had(plan, folder, part)
    if len(had) != shards.samples:
        raise UserError(f"{len(had)} of {shards.samples} {part} samples were read", "Verify the shards with shards/verify_shards.py.")
    plan.checked.add((folder, part))
    return len(had)


def _had(plan: FoldPlan, folder: Path, part: str) -> Tensor:
    """The samples [K, 3] (unit, segment, phase) whose features are stored: as rank 0 sees them, since ranks may begin one by one."""
    options = plan.recipe.features
    box: list[Tensor] = []

    def moved(place: str) -> None:
        plan.around.watch.beat(f"features, looking for what is stored{place and ', '}{place}", alone=not place)

    def look(on: Callable[[], None]) -> None:
        box.append(stored_samples(folder, part, len(options.offsets), options.dtype, on))

    moved("")
    apart(look if rank() == 0 else None, moved)
    found: Tensor = from_first(box[0] if box else None)
    return found


class Tars:
    """The tars that this rank writes of one part; `start` samples were there before, which names those of this start apart."""

    def __init__(self, plan: FoldPlan, folder: Path, part: str, start: int) -> None:
        self.folder, self.part, self.start, self.dtype = folder, part, start, plan.recipe.features.dtype
        self.samples = self._number = 0
        self._open()

    def _open(self) -> None:
        self._writer = FeatureWriter(self.folder, self.part, f"{self.start:06d}-{rank():04d}-{self._number:04d}", self.dtype)
        self._number += 1

    def add(self, batch: Batch, visual: Tensor, audio: Tensor) -> None:
        """Features [B, O, 8, 512] of the samples of a batch."""
        ids, labels = batch["id"].cpu().numpy(), batch["labels"].cpu().numpy()
        for row in range(len(ids)):
            self._writer.add(ids[row], visual[row], audio[row], labels[row])
        self.samples += len(ids)
        if self._writer.count >= SAMPLES:
            self._writer.close()
            self._open()

    def close(self) -> None:
        """Publish what is written."""
        self._writer.close()


def _write(plan: FoldPlan, loader: ClipLoader, tars: Tars, visual: nn.Module, audio: nn.Module, steps: int) -> None:
    batches = loader.batches()
    for _ in range(loader.steps):  # as many on every rank, so that all can agree to stop; a rank may have no samples in the last
        batch = next(batches, None)
        if batch is not None:
            tars.add(batch, *features_of(plan, batch, visual, audio))
        plan.around.watch.beat(f"features, after {tars.samples} samples")
        plan.around.status(stage="features", epoch=0, step=min(tars.samples, steps), steps=steps, score=None)
        if any_rank(bool(stop.requested()), plan.device):
            tars.close()
            raise stop.Stopped(stop.requested() or "another rank was asked to stop")
    tars.close()


def features_of(plan: FoldPlan, batch: Batch, visual: nn.Module, audio: nn.Module) -> tuple[Tensor, Tensor]:
    """Visual and audio features [B, O, 8, 512] of a dense batch, one offset at a time."""
    offsets = plan.recipe.features.offsets
    with autocast(plan.recipe.engine.precision, plan.device):
        faces = []
        for offset in offsets:
            frames = clips(batch["frames"], offset)
            faces.append(visual(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]))
        voices = [audio(batch["mel"][:, place]) for place in range(len(offsets))]
    return torch.stack(faces, dim=1), torch.stack(voices, dim=1)
