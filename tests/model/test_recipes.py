"""The recipes of this folder hold the paper's and the authors' numbers, and every variant of a sweep is a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jmt_dist.config import FusionOptions, JmtOptions, Recipe
from jmt_dist.model.heads import AudioModel, VisualModel
from jmt_dist.model.zoo import make_fusion
from jmt_dist.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
SWEEPS = ("grid.yaml", "ablation.yaml")


def variants(name: str) -> dict[str, list[str]]:
    sweep = yaml.safe_load((RECIPES / name).read_text())
    assert set(sweep) == {"recipe", "variants"} and (RECIPES / sweep["recipe"]).is_file()
    return sweep["variants"]


def test_paper_states_the_papers_numbers() -> None:
    """From paper.txt, sections 3 and 4.2, typed again here."""
    recipe = load_recipe(RECIPES / "paper.yaml")
    v, a, f = recipe.visual, recipe.audio, recipe.fusion
    assert (v.depth, v.weights, v.size, v.flip, v.dropout, v.batch, v.max_epochs) == (18, "kinetics400", 224, True, 0.8, 8, 50)
    assert (v.optimizer.name, v.optimizer.lr) == ("sgd", 1e-3)
    assert (a.gru, a.weights, a.optimizer.name, a.optimizer.lr, a.batch) == (True, "imagenet", "adam", 1e-2, 64)
    assert (f.model, f.optimizer.name, f.optimizer.lr, f.batch, f.max_epochs) == ("jmt", "sgd", 5e-4, 2, 5)
    assert v.crop < 112  # "random cropping"
    assert f.jmt == JmtOptions(score="sigmoid", rows="key", scale="none", cross="separate", head="concat", joint=True)


def test_the_defaults_are_the_paper() -> None:
    assert load_recipe(RECIPES / "paper.yaml") == Recipe()


def test_reference_is_the_authors_code() -> None:
    recipe = load_recipe(RECIPES / "reference.yaml")
    wanted = JmtOptions(score="softmax", rows="query", scale="sqrt", cross="shared", head="self_attention", normalise=True)
    assert recipe.fusion.jmt == wanted and recipe.visual.pooling == "max" and recipe.name == "reference"
    assert (recipe.fusion.optimizer.lr, recipe.fusion.optimizer.nesterov, recipe.fusion.batch) == (1e-4, True, 64)
    assert recipe.visual.dropout == 0.8  # from its base


def test_the_recipes_models_build() -> None:
    for name, parameters in (("paper.yaml", 14_962_690), ("reference.yaml", None)):
        recipe = load_recipe(RECIPES / name)
        VisualModel(recipe.visual)
        AudioModel(recipe.audio)
        count = sum(p.numel() for p in make_fusion(recipe.fusion).parameters())
        assert parameters in (None, count)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_variant_is_a_recipe_of_its_own(name: str) -> None:
    built = {key: load_recipe(RECIPES / "paper.yaml", words) for key, words in variants(name).items()}
    assert len({recipe.model_dump_json() for recipe in built.values()}) == len(built) > 10
    for recipe in built.values():  # sweeps compare fusions on one set of features
        assert (recipe.visual, recipe.audio, recipe.features) == (Recipe().visual, Recipe().audio, Recipe().features)


def test_sweeps_cover_the_winner_and_every_model() -> None:
    grid = [load_recipe(RECIPES / "paper.yaml", words).fusion for words in variants("grid.yaml").values()]
    assert any((f.optimizer.lr, f.batch) == (5e-4, 2) for f in grid)
    from jmt_dist.config import FUSION_MODELS

    models = {load_recipe(RECIPES / "paper.yaml", words).fusion.model for words in variants("ablation.yaml").values()}
    assert models == set(FUSION_MODELS)


def test_make_fusion_follows_the_options() -> None:
    assert sum(p.numel() for p in make_fusion(FusionOptions(model="concat")).parameters()) < 2_000_000
