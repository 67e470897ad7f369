"""paper.yaml at its own geometry: every stage builds and takes one training step on CPU, with the batch overridden to 1."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from jmt_dist.config import PackOptions
from jmt_dist.data.pack import pack
from tests.data.tree import write_unit
from tests.ranks import run_ranks

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "paper.yaml"


def one_step_of_each_stage(rank: int, folder: Path) -> None:
    from jmt_dist.recipe import load_recipe, load_site
    from jmt_dist.train.fold import run_fold

    words = [f"data.shards={folder}/shards", "visual.weights=none", "audio.weights=none", "evaluate.offsets=[0]"]
    words += [f"{stage}.{limit}" for stage in ("visual", "audio", "fusion") for limit in ("batch=1", "max_steps=1")]
    words += ["features.batch=1", "features.offsets=[0]", "fusion.validation_offsets=[0]", "fusion.offsets_per_epoch=1"]
    recipe = load_recipe(RECIPE, words)
    assert (recipe.visual.size, recipe.visual.depth, recipe.visual.dropout) == (224, 18, 0.8)
    run_fold(recipe, load_site(None), "official", folder / "out")


@pytest.mark.highmem
def test_each_stage_of_the_paper_takes_a_step(tmp_path: Path) -> None:
    """One subsequence of 8 clips of 8 frames at 224 x 224 takes 9 GB in fp32, less under the recipe's autocast."""
    for k in range(7):  # units of one row: one sample each, so that the dense passes stay short
        write_unit(tmp_path / "tree", f"u{k}", 1, k, "Train_Set" if k < 5 else "Validation_Set")
    pack(PackOptions(source=str(tmp_path / "tree"), out=str(tmp_path / "shards"), workers=1), say=lambda line: None)
    run_ranks(1, one_step_of_each_stage, tmp_path)
    official = tmp_path / "out" / "official"
    for stage in ("visual", "audio", "fusion/jmt-seed0"):
        assert json.loads((official / stage / "done.json").read_text())["steps"] == 1
    metrics = json.loads((official / "metrics.json").read_text())
    assert metrics["frames"] == 2 and math.isfinite(metrics["average"])
