"""Six folds that take seconds each: fusion and evaluate on features that are drawn here, in the place of backbones'."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from jmt_dist.config import PackOptions, Recipe
from jmt_dist.data.feature_tars import FeatureWriter, write_description
from jmt_dist.data.pack import pack
from jmt_dist.recipe import load_recipe, load_site
from jmt_dist.train.plan import FoldPlan, open_parts
from jmt_dist.train.stage import write_json
from tests.data.tree import write_unit

FOLDS = ("official", "fold-1", "fold-2", "fold-3", "fold-4", "fold-5")
WANTED = ("id.i32", "va.f32")
WORDS = [
    "name=micro", "stages=[fusion,evaluate]", "visual.weights=none", "audio.weights=none", "features.offsets=[0,4]",
    "engine.precision=fp32", "fusion.batch=4", "fusion.max_epochs=8", "fusion.patience=8", "fusion.model=concat", "fusion.save_steps=10",
    "fusion.offsets_per_epoch=2", "fusion.validation_offsets=[0]", "fusion.jmt.scale=sqrt", "fusion.jmt.bias=log_length",
    "fusion.jmt.dropout=0.1", "evaluate.offsets=[0,4]", "evaluate.bootstrap=20",
]  # fmt: skip


def write_shards(folder: Path) -> Path:
    for k in range(10):
        write_unit(folder / "tree", f"u{k}", 300, k, "Train_Set" if k < 8 else "Validation_Set")
    pack(PackOptions(source=str(folder / "tree"), out=str(folder / "shards"), workers=1), say=lambda line: None)
    return folder / "shards"


def write_features(out: Path, recipe: Recipe) -> None:
    """What the features stage of every fold would leave: labels of the shards, and features that say something of them."""
    for fold in FOLDS:
        manifest, parts = open_parts(recipe, load_site(None), fold)
        around: Any = None
        plan = FoldPlan(recipe, load_site(None), fold, out / fold, torch.device("cpu"), manifest, parts, around)
        for part, shards in parts.items():
            writer = FeatureWriter(plan.folder / "features", part, "000000-0000-0000")
            for tar, index in zip(shards.tars, shards.indexes, strict=True):
                data = Path(tar).read_bytes()
                for line in Path(index).read_text().splitlines()[1:]:
                    words = line.split()
                    raw = {words[k]: cut(data, int(words[k + 1]), int(words[k + 2])) for k in range(0, len(words), 4) if words[k] in WANTED}
                    _add(writer, np.frombuffer(raw["id.i32"], "<i4"), np.frombuffer(raw["va.f32"], "<f4").reshape(64, 2), recipe)
            writer.close()
        write_description(plan.folder / "features", recipe.features.offsets)
        write_json(plan.folder / "features" / "done.json", {"key": plan.key("features")})


def cut(data: bytes, at: int, size: int) -> bytes:
    return data[at : at + size]


def _add(writer: FeatureWriter, ident: Any, labels: Any, recipe: Recipe) -> None:
    draw = np.random.default_rng(ident[:3].tolist())
    offsets = recipe.features.offsets
    va = np.nan_to_num(labels.reshape(8, 8, 2).swapaxes(0, 1)[offsets])  # [offset, clip, 2]
    streams = []
    for target in (0, 1):
        noise = draw.normal(size=(len(offsets), 8, 512)).astype(np.float32)
        streams.append(torch.from_numpy(noise * 0.5 + va[..., target : target + 1].astype(np.float32)))
    writer.add(ident, streams[0], streams[1], labels)


def undisturbed(number: int, words: list[str], out: Path) -> None:
    """The folds of one of two processes that know nothing of each other, each fold left alone."""
    from jmt_dist.train.fold import run_fold

    dist.destroy_process_group()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", f"file://{out}/.meeting-{number}", rank=0, world_size=1)
    for fold in FOLDS[number::2]:
        run_fold(load_recipe(None, words), load_site(None, ["device=cpu"]), fold, out)
