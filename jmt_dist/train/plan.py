"""What the stages of one fold share: where they write, what they depend on, how they report (DESIGN section 10)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jmt_dist.config import AudioOptions, FusionModel, Recipe, Site, TrainOptions, VisualOptions
from jmt_dist.data.pipeline import derive_seed
from jmt_dist.data.shards import Manifest, ShardSet, fold_shards, open_shards
from jmt_dist.data.staging import stage_in, staged, staging_folder
from jmt_dist.errors import UserError
from jmt_dist.model.weights import digest
from jmt_dist.train import stop
from jmt_dist.train.ranks import any_rank, apart, from_first, rank
from jmt_dist.train.stage import Surroundings

KEY_FILE = "key.txt"


def make_key(*parts: object) -> str:
    """16 hexadecimal digits of a hash over everything a stage's result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def telling(options: TrainOptions) -> dict[str, Any]:
    """A trained stage's options as its key holds them: how often it is saved, and how many checkpoints stay, tells on no result.

    These count as their defaults, so that a job that is preempted more often than was thought goes on with more saves.
    """
    return options.model_copy(update={name: TrainOptions.model_fields[name].default for name in ("save_steps", "keep")}).model_dump()


@dataclass(frozen=True)
class FoldPlan:
    """One fold of one recipe: its folder, its shards, and how to report.

    `parts` maps train, validation and, where the recipe predicts them, test to their shards.
    """

    recipe: Recipe
    site: Site
    fold: str
    folder: Path
    device: torch.device
    manifest: Manifest
    parts: dict[str, ShardSet]
    around: Surroundings
    keys: dict[str, str] = field(default_factory=dict)
    checked: set[tuple[Path, str]] = field(default_factory=set)  # features (folder, part) whose bytes this process has compared

    def key(self, stage: str) -> str:
        """The key of a stage: its options, the data, and the keys of the stages before it."""
        if stage not in self.keys:
            self.keys[stage] = self._make_key(stage)
        return self.keys[stage]

    def _make_key(self, stage: str) -> str:
        recipe = self.recipe
        if stage in ("visual", "audio"):
            options: VisualOptions | AudioOptions = recipe.visual if stage == "visual" else recipe.audio
            data = {part: self.parts[part].index_hash for part in ("train", "validation")}
            settings = telling(options), recipe.engine.model_dump(), recipe.seed, recipe.label
            return make_key(stage, *settings, data, self._manifest(), digest(options))
        if stage == "features":
            # not those of test units, which may be asked for once all is trained: the manifest's hash tells what they are
            data = {part: shards.index_hash for part, shards in self.parts.items() if part != "test"}
            stored = (recipe.features.offsets, recipe.features.dtype, recipe.engine.precision)
            return make_key(stage, stored, data, self.key("visual"), self.key("audio"))
        raise ValueError(stage)

    def fusion_key(self, model: FusionModel, seed: int) -> str:
        """The key of the training of one fusion model with one seed."""
        beside = {"model", "seeds", "baselines", "baseline_folds", *(() if model == "jmt" else ("jmt",))}
        options = {name: value for name, value in telling(self.recipe.fusion).items() if name not in beside}
        return make_key("fusion", model, seed, options, self.recipe.engine.model_dump(), self.recipe.seed, self.key("features"))

    def _manifest(self) -> str:
        return self.parts["train"].manifest_hash

    def fusions(self) -> list[tuple[FusionModel, int]]:
        """The (model, seed) pairs this fold trains: the recipe's model first, then its baselines where they belong."""
        fusion = self.recipe.fusion
        baselines = fusion.baselines if self.fold in fusion.baseline_folds else []
        return [(model, seed) for model in (fusion.model, *baselines) for seed in fusion.seeds]

    def seed(self, stage: str, more: int = 0) -> int:
        """The seed of a stage: streams of different stages never meet."""
        return derive_seed(stage, self.recipe.seed, more)

    def stage_in(self) -> None:
        """From now on the fold's shards are read from copies on the node's own disk, made once per node (site.staging). Collective.

        Copying may take longer than a collective may. A rank that copies nothing more for `site.hang_seconds`, or is dead, ends the job.
        Raises Stopped where a stop was requested meanwhile, and UserError for what `stage_in` refuses.
        """
        folder = staging_folder(self.site.staging, self.manifest)
        if self.parts["train"].tars[0].parent == folder:
            return

        def copy(alive: Callable[[], None]) -> None:
            def go_on() -> None:
                alive()
                if stop.requested():
                    raise stop.Stopped

            with contextlib.suppress(stop.Stopped):  # the ranks agree on it below; what is copied stays for the next start
                copied = sum(stage_in(shards, self.manifest, folder, go_on) for shards in self.parts.values())
                print(f"{self.fold}: shards are read from {folder}, {copied / 2**30:.2f} GB copied now", flush=True)

        def moved(place: str) -> None:
            self.around.watch.beat(f"copying shards to {folder}{place and ', '}{place}", alone=not place)

        moved("")
        apart(copy if int(os.environ.get("LOCAL_RANK", "0")) == 0 else None, moved)
        if any_rank(bool(stop.requested()), self.device):
            raise stop.Stopped(stop.requested() or "another rank was asked to stop")
        self.parts.update({name: staged(shards, folder) for name, shards in self.parts.items()})

    def model(self, make: Any, stage: str, more: int = 0) -> nn.Module:
        """A module made with the initialisation stream of a stage, equal on every rank."""
        torch.manual_seed(derive_seed("init", self.seed(stage, more)))
        module: nn.Module = make()
        return module


def open_parts(recipe: Recipe, site: Site, fold: str) -> tuple[Manifest, dict[str, ShardSet]]:
    """The manifest and the shards of a fold's parts. Raises UserError for a missing folder, fold or empty split."""
    folder = Path(recipe.data.shards)
    manifest = open_shards(folder)
    names = ["train", "validation", *(["test"] if recipe.evaluate.test else [])]
    parts = {name: fold_shards(folder, recipe.folds, fold, name) for name in names}  # type: ignore[arg-type]
    return manifest, parts


def claim(folder: Path, key: str) -> None:
    """Make a stage's folder; one that belongs to another key is moved aside, never mixed with or deleted. Collective."""
    problem = ""
    if rank() == 0:
        try:
            _claim(folder, key)
        except OSError as error:
            problem = str(error)
    problem = from_first(problem)
    if problem:
        raise UserError(f"{folder} cannot be written ({problem})", "Choose another out= or mend the permissions.")


def _claim(folder: Path, key: str) -> None:
    label = folder / KEY_FILE
    if folder.exists():
        old = label.read_text().strip() if label.is_file() else "unknown"
        if old == key:
            return
        aside = folder.with_name(f"{folder.name}.{old}")
        if aside.exists():
            shutil.rmtree(aside)  # the same key was moved aside before and made anew since: the newer one stays
        os.replace(folder, aside)
        print(f"{folder} was made by other settings and is now {aside}", flush=True)
    folder.mkdir(parents=True)
    label.write_text(key + "\n")
