"""What each stage's result depends on: a change makes exactly those stages anew, and no other (DESIGN section 10)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jmt_dist.config import Recipe
from jmt_dist.data.shards import ShardSet
from jmt_dist.recipe import load_recipe, load_site
from jmt_dist.train.finetune import finetune_key
from jmt_dist.train.plan import FoldPlan

CPU = torch.device("cpu")
WORDS = ["visual.weights=none", "audio.weights=none", "fusion.model=jmt"]
ALL = {"visual", "audio", "features", "fusion", "finetune"}
LATER = {"features", "fusion", "finetune"}


def keys(recipe: Recipe, manifest: str = "m", **indexes: str) -> dict[str, str]:
    hashes = {"train": "t", "validation": "v", **indexes}
    parts = {part: ShardSet((), (), 1, manifest, index) for part, index in hashes.items()}
    nothing: Any = None
    plan = FoldPlan(recipe, load_site(None), "official", Path("out"), CPU, nothing, parts, nothing)
    found = {stage: plan.key(stage) for stage in ("visual", "audio", "features")}
    return {**found, "fusion": plan.fusion_key("jmt", 0), "finetune": finetune_key(plan, 0)}


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {stage for stage in one if one[stage] != other[stage]}


@pytest.mark.parametrize(
    ("word", "stages"),
    [
        ("visual.optimizer.lr=0.7", {"visual"} | LATER),
        ("audio.optimizer.weight_decay=0.7", {"audio"} | LATER),
        ("audio.seed=3", {"audio"} | LATER),
        ("features.dtype=float32", LATER),
        ("fusion.optimizer.lr=0.7", {"fusion", "finetune"}),
        ("fusion.jmt.dropout=0.3", {"fusion", "finetune"}),
        ("finetuning.optimizer.lr=0.7", {"finetune"}),
        ("engine.precision=fp32", ALL),
        ("label=middle", ALL),
        ("seed=77", ALL),
        # how fast, how often or beside what else it is done changes no result
        ("data.prefetch=5", set()),
        ("features.batch=3", set()),
        ("visual.save_steps=50", set()),
        ("audio.keep=1", set()),
        ("fusion.save_steps=0", set()),
        ("finetuning.keep=7", set()),
        ("fusion.seeds=[0,1,2]", set()),
        ("fusion.baselines=[lstm]", set()),
        ("evaluate.bootstrap=7", set()),
        ("profile=true", set()),
        ("name=other", set()),
        ("stages=[fusion]", set()),
    ],
)
def test_a_setting_changes_the_keys_of_the_stages_it_tells_on(word: str, stages: set[str]) -> None:
    assert changed(keys(load_recipe(None, WORDS)), keys(load_recipe(None, [*WORDS, word]))) == stages


def test_data_and_initial_weights_change_the_keys_of_what_is_made_of_them(tmp_path: Path) -> None:
    recipe = load_recipe(None, WORDS)
    assert changed(keys(recipe), keys(recipe, manifest="n")) == ALL
    assert changed(keys(recipe), keys(recipe, train="u")) == ALL == changed(keys(recipe), keys(recipe, validation="w"))
    assert changed(keys(recipe), keys(recipe, test="x")) == set()  # test units are predicted, never trained on
    file = tmp_path / "visual.safetensors"
    made = load_recipe(None, [*WORDS, f"visual.weights={file}"])
    file.write_bytes(b"one")
    one = keys(made)
    file.write_bytes(b"two")  # another content under the same name
    assert changed(one, keys(made)) == {"visual"} | LATER
