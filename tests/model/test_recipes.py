"""The recipes of this folder hold the paper's and the authors' numbers, and every variant of a sweep is a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jmt_dist.cluster.sweep import variants as sweep_variants
from jmt_dist.config import FusionOptions, JmtOptions, Recipe
from jmt_dist.model.heads import AudioModel, VisualModel
from jmt_dist.model.zoo import make_fusion
from jmt_dist.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
SWEEPS = ("grid.yaml", "ablation.yaml")


def variants(name: str) -> dict[str, Recipe]:
    """The recipes of a sweep by the names of its variants; their own name, which differs anyway, left out."""
    return {key: recipe.model_copy(update={"name": ""}) for key, recipe in sweep_variants(RECIPES / name, []).items()}


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
    built = variants(name)
    assert len({recipe.model_dump_json() for recipe in built.values()}) == len(built) > 10
    for recipe in built.values():  # sweeps compare fusions on one set of features
        assert (recipe.visual, recipe.audio, recipe.features) == (Recipe().visual, Recipe().audio, Recipe().features)


def test_sweeps_cover_the_winner_and_every_model() -> None:
    grid = [recipe.fusion for recipe in variants("grid.yaml").values()]
    assert any((f.optimizer.lr, f.batch) == (5e-4, 2) for f in grid)
    from jmt_dist.config import FUSION_MODELS

    models = {recipe.fusion.model for recipe in variants("ablation.yaml").values()}
    assert models == set(FUSION_MODELS)


@pytest.mark.parametrize(("name", "base"), [("zoo.yaml", "paper.yaml"), ("zoo-demo.yaml", "demo.yaml")])
def test_the_zoo_is_every_model_with_one_budget_and_three_seeds(name: str, base: str) -> None:
    from jmt_dist.config import FUSION_MODELS

    assert yaml.safe_load((RECIPES / name).read_text())["recipe"] == base
    built = variants(name)
    assert {key.replace("-", "_"): recipe.fusion.model for key, recipe in built.items()} == {model: model for model in FUSION_MODELS}
    same = {
        recipe.model_copy(update={"fusion": recipe.fusion.model_copy(update={"model": "jmt"})}).model_dump_json()
        for recipe in built.values()
    }
    assert len(same) == 1  # nothing else differs
    assert all(recipe.fusion.seeds == [0, 1, 2] and recipe.fusion.baselines == [] for recipe in built.values())


def test_the_ablation_has_what_the_paper_is_made_of() -> None:
    built = [recipe.fusion for recipe in variants("ablation.yaml").values()]
    jmts = [fusion.jmt for fusion in built if fusion.model == "jmt"]
    for key, values in (("joint", {True, False}), ("score", {"sigmoid", "softmax"}), ("cross", {"separate", "shared"}),
                        ("head", {"concat", "self_attention"})):  # fmt: skip
        assert {getattr(jmt, key) for jmt in jmts} == values, key
    assert {(jmt.heads, jmt.layers) for jmt in jmts} == {(1, 1), (4, 1), (1, 2), (4, 2)}
    assert {"audio", "visual"} <= {fusion.model for fusion in built}


def test_make_fusion_follows_the_options() -> None:
    assert sum(p.numel() for p in make_fusion(FusionOptions(model="concat")).parameters()) < 2_000_000
