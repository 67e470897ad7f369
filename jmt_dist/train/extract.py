"""The features stage: what the frozen backbones say of every sample, stored for the fusion (paper, section 4.2)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from jmt_dist.data.features import FeatureWriter, write_description
from jmt_dist.data.pipeline import ClipLoader, clips
from jmt_dist.errors import UserError
from jmt_dist.model.heads import AudioModel, VisualModel
from jmt_dist.train.checkpoint import load_weights
from jmt_dist.train.plan import FoldPlan, claim
from jmt_dist.train.ranks import barrier, rank, sum_over_ranks, world
from jmt_dist.train.stage import finished, write_json


def autocast(precision: str, device: torch.device) -> Any:
    """The context in which a model outside an engine computes as it would inside one."""
    kind = {"autocast": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, kind) if kind else contextlib.nullcontext()


def extract(plan: FoldPlan) -> None:
    """Write the features of all parts of the fold; a part whose tar this rank has finished is not computed again."""
    folder, key = plan.folder / "features", plan.key("features")
    if finished(folder, key) is not None:
        return
    claim(folder, key)
    visual, audio = VisualModel(plan.recipe.visual), AudioModel(plan.recipe.audio)
    load_weights(visual, plan.folder / "visual" / "best.safetensors")
    load_weights(audio, plan.folder / "audio" / "best.safetensors")
    visual, audio = visual.to(plan.device).eval(), audio.to(plan.device).eval()
    counts = {}
    for part in plan.parts:
        counts[part] = _part(plan, part, visual, audio)
    if rank() == 0:
        write_description(folder, plan.recipe.features.offsets, world())
        write_json(folder / "done.json", {"key": key, "samples": counts})
    barrier()


@torch.no_grad()
def _part(plan: FoldPlan, part: str, visual: VisualModel, audio: AudioModel) -> int:
    """One part; returns the number of samples all ranks wrote, which must be all there are."""
    options, shards = plan.recipe.features, plan.parts[part]
    loader = ClipLoader(
        shards, data=plan.recipe.data, batch=options.batch, rank=rank(), world=world(), offsets=options.offsets,
        size=plan.recipe.visual.size, device=plan.device,
    )  # fmt: skip
    writer = FeatureWriter(plan.folder / "features", part, rank())
    written = 0
    for batch in loader.batches():
        with autocast(plan.recipe.engine.precision, plan.device):
            faces = [visual(clips(batch["frames"], offset))[0] for offset in options.offsets]
            voices = [audio(batch["mel"][:, place])[0] for place in range(len(options.offsets))]
        v, a = torch.stack(faces, dim=1), torch.stack(voices, dim=1)
        ids, labels = batch["id"].cpu().numpy(), batch["labels"].cpu().numpy()
        for row in range(len(ids)):
            writer.add(ids[row], v[row], a[row], labels[row])
        written += len(ids)
        plan.around.status(stage="features", epoch=0, step=written, steps=-(-shards.samples // world()), score=None)
    writer.close()
    total = int(sum_over_ranks(torch.tensor(float(written), device=plan.device)))
    if total != shards.samples:
        raise UserError(f"{total} of {shards.samples} {part} samples were read", "Verify the shards with shards/verify_shards.py.")
    return total
