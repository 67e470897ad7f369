"""Every kind of chance has a stream of its own, and the same recipe gives the same weights bit for bit."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jmt_dist.config import PackOptions
from jmt_dist.data.pack import pack
from tests.data.tree import write_unit
from tests.ranks import run_ranks

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
SMALL = ["visual.size=16", "visual.crop=96", "visual.flip=true", "visual.batch=4", "visual.max_steps=3", "visual.dropout=0.4"]


def plan(folder: Path, out: str, words: list[str]) -> Any:
    from jmt_dist.recipe import load_recipe, load_site
    from jmt_dist.train import ranks
    from jmt_dist.train.plan import FoldPlan, open_parts
    from jmt_dist.train.task import Surroundings

    cpu = torch.device("cpu")
    ranks.start(cpu)
    recipe, site = load_recipe(RECIPE, [f"data.shards={folder}/shards", *SMALL, *words]), load_site(None)
    around = Surroundings(recipe.engine, cpu, lambda metrics, step: None, lambda **values: None)
    manifest, parts = open_parts(recipe, site, "official")
    return FoldPlan(recipe, site, "official", folder / out, cpu, manifest, parts, around)


def drawn(rank: int, folder: Path, variants: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """For each variant of the recipe: initial weights, the first batches, and what dropout will draw from."""
    from jmt_dist.train.backbone import visual_stage
    from jmt_dist.train.stage import Trainer

    found = {}
    for name, words in variants.items():
        made = plan(folder, name, words)
        stage = visual_stage(made)
        weights = {key: value.clone() for key, value in stage.model.state_dict().items()}
        trainer = Trainer(stage, made.around)
        masks = torch.get_rng_state()
        batches = [{key: value.clone() for key, value in batch.items()} for batch in islice(stage.loader.batches(0, 0), 3)]
        found[name] = {"weights": weights, "masks": masks, "batches": batches}
        trainer.engine.destroy()
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> dict[str, bool]:
    """Which streams of two variants are equal, bit for bit."""
    crops = []  # a flipped sample is equal when flipped back, but for the rounding of the resize
    for first, second in zip(a["batches"], b["batches"], strict=True):
        for x, y in zip(first["frames"], second["frames"], strict=True):
            crops.append(torch.equal(x, y) or torch.allclose(x, y.flip(2), atol=1e-3))
    return {
        "weights": all(torch.equal(a["weights"][name], value) for name, value in b["weights"].items()),
        "dropout": torch.equal(a["masks"], b["masks"]),
        "order": all(torch.equal(x["id"], y["id"]) for x, y in zip(a["batches"], b["batches"], strict=True)),
        "offsets": all(torch.equal(x["q"], y["q"]) for x, y in zip(a["batches"], b["batches"], strict=True)),
        "crops": all(crops),
        "frames": all(torch.equal(x["frames"], y["frames"]) for x, y in zip(a["batches"], b["batches"], strict=True)),
    }


VARIANTS = {
    "base": [],
    "again": [],
    "dropout": ["visual.dropout=0"],
    "flip": ["visual.flip=false"],
    "crop": ["visual.crop=112"],
    "clips": ["visual.clips_per_subsequence=3"],
    "label": ["label=middle"],
    "seed": ["seed=1"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    for k in range(7):
        write_unit(folder / "tree", f"u{k}", 70, k, "Train_Set" if k < 5 else "Validation_Set")
    pack(PackOptions(source=str(folder / "tree"), out=str(folder / "shards"), workers=1), say=lambda line: None)
    return folder


@pytest.mark.slow
def test_switching_one_source_of_chance_off_moves_no_other(place: Path) -> None:
    found = run_ranks(1, drawn, place, VARIANTS)[0]
    equal = {name: same(found["base"], found[name]) for name in VARIANTS}
    everything = dict.fromkeys(equal["base"], True)
    for name in ("base", "again", "dropout", "clips", "label"):
        assert equal[name] == everything, name
    assert equal["flip"] == {**everything, "frames": False}  # some were flipped, from the very same crops
    assert equal["crop"] == {**everything, "frames": False, "crops": False}
    assert equal["seed"] == dict.fromkeys(everything, False)


def trained(rank: int, folder: Path) -> None:
    from jmt_dist.train.backbone import visual_stage
    from jmt_dist.train.stage import train

    for name in ("one", "two"):
        made = plan(folder, name, ["visual.validation_offsets=[1]"])
        (folder / name).mkdir()
        train(visual_stage(made), made.around)


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_weights_bit_for_bit(place: Path) -> None:
    run_ranks(1, trained, place)
    one, two = (load_file(place / name / "visual" / "best.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
