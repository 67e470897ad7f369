"""Frozen features equal the frozen backbones; and the whole pipeline trained end to end, stopped, resumed and evaluated."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jmt_dist.config import PackOptions, Recipe
from jmt_dist.data.pack import pack
from jmt_dist.evaluate.predict import read_predictions
from tests.data.tree import write_unit
from tests.ranks import run_ranks

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
ROWS = 70
CPU = torch.device("cpu")

pytestmark = pytest.mark.slow


def recipe(folder: Path, *more: str) -> Recipe:
    from jmt_dist.recipe import load_recipe

    words = [f"data.shards={folder}/shards", "visual.size=16", "evaluate.bootstrap=20", "evaluate.offsets=[1,5]", "features.batch=2"]
    words += ["visual.batch=2", "audio.batch=2", "fusion.batch=4", "fusion.seeds=[0]", "fusion.baselines=[]"]
    words += ["visual.max_steps=2", "audio.max_steps=2", "fusion.max_epochs=1", "finetune=true", "finetuning.max_steps=3"]
    words += ["finetuning.save_steps=1", "finetuning.validation_offsets=[1]"]
    return load_recipe(RECIPE, [*words, *more])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    for k in range(7):
        write_unit(folder / "tree", f"u{k}", ROWS, k, "Train_Set" if k < 5 else "Validation_Set")
    pack(PackOptions(source=str(folder / "tree"), out=str(folder / "shards"), workers=1), say=lambda line: None)
    return folder


def fold(rank: int, folder: Path, out: Path, stop_at: tuple[str, int] | None, dtype: str) -> str:
    """Run the fold; with `stop_at` a stop is requested at that step of that stage. Returns why it stopped."""
    from jmt_dist.recipe import load_site
    from jmt_dist.train import report, stop
    from jmt_dist.train.fold import run_fold

    progress = report.Status.progress

    def ask(self: report.Status, **values: Any) -> None:
        progress(self, **values)
        if (values["stage"], values["step"]) == stop_at:
            stop.request("test")

    stop.clear()
    report.Status.progress = ask  # type: ignore[method-assign]
    try:
        profile = f"profile={str(dtype == 'float32').lower()}"
        run_fold(recipe(folder, f"features.dtype={dtype}", profile), load_site(None), "official", out)
    except stop.Stopped as reason:
        return str(reason)
    finally:
        report.Status.progress = progress  # type: ignore[method-assign]
    return ""


def found(official: Path) -> dict[str, Any]:
    weights = {
        str(path.relative_to(official)): hashlib.sha256(path.read_bytes()).hexdigest() for path in official.rglob("best.safetensors")
    }
    results = {str(path.relative_to(official)): json.loads(path.read_text()) for path in official.rglob("done.json")}
    return {"weights": weights, "results": results, "metrics": json.loads((official / "metrics.json").read_text())}


def test_a_fold_with_finetuning_stopped_in_its_stages_ends_where_an_undisturbed_one_does(place: Path, tmp_path: Path) -> None:
    assert run_ranks(1, fold, place, tmp_path / "whole", None, "float16") == [""]
    for stop_at in (("features", 2), ("finetune/jmt-seed0", 2)):
        assert run_ranks(1, fold, place, tmp_path / "parts", stop_at, "float16") == ["test"]
        name = stop_at[0].split("/")[0]
        assert not list((tmp_path / "parts" / "official" / name).rglob("done.json"))
    assert len(list((tmp_path / "parts" / "official" / "features").glob("train-*.tar"))) > 1  # before the stop and after it
    assert run_ranks(1, fold, place, tmp_path / "parts", None, "float16") == [""]
    whole, parts = found(tmp_path / "whole" / "official"), found(tmp_path / "parts" / "official")
    assert parts == whole
    tuned = whole["metrics"]["baselines"]["jmt-finetuned"]
    assert all(math.isfinite(tuned[target]) for target in ("valence", "arousal", "average")) and tuned["frames"] == 2 * ROWS
    assert tuned["average"] != whole["metrics"]["average"]  # another model than the frozen one, which is still the fold's result
    assert whole["metrics"]["model"] == "jmt" and whole["results"]["finetune/jmt-seed0/done.json"]["steps"] == 3
    official = tmp_path / "whole" / "official"
    rows = read_predictions(official / "evaluate" / "jmt-finetuned-seed0" / "predictions.parquet")
    assert set(rows) == {"u5", "u6"} and all(np.isfinite(unit.va).all() and len(unit.va) == ROWS for unit in rows.values())


def compared(rank: int, folder: Path, out: Path) -> dict[str, float]:
    """Largest differences between predictions from stored features and through the frozen backbones, by how they are stored."""
    from jmt_dist.data.pipeline import ClipLoader, clips
    from jmt_dist.recipe import load_site
    from jmt_dist.train.finetune import trained_parts
    from jmt_dist.train.fuse import predict_all, stored_features
    from jmt_dist.train.plan import FoldPlan, open_parts
    from jmt_dist.train.stage import Surroundings

    differences = {}
    for dtype in ("float16", "float32"):
        assert fold(rank, folder, out, None, dtype) == ""
        made = recipe(folder, f"features.dtype={dtype}")
        manifest, parts = open_parts(made, load_site(None), "official")
        around = Surroundings(made.engine, CPU, lambda values, step: None, lambda **values: None)
        plan = FoldPlan(made, load_site(None), "official", out / "official", CPU, manifest, parts, around)
        net = trained_parts(plan, 0).eval()
        features = stored_features(plan, "validation")
        stored = predict_all(net.fusion, features, CPU)
        places = {tuple(ident[:3]): place for place, ident in enumerate(features.ident.tolist())}
        worst, spread = 0.0, float(stored.std())
        with torch.no_grad():
            loader = ClipLoader(parts["validation"], data=made.data, batch=3, offsets=features.offsets, size=made.visual.size)
            for batch in loader.batches():
                for number, offset in enumerate(features.offsets):
                    direct = net(clips(batch["frames"], offset), batch["mel"][:, number]).numpy()
                    mine = stored[[places[tuple(ident[:3])] for ident in batch["id"].tolist()], number]
                    worst = max(worst, float(np.abs(direct - mine).max()))
        differences |= {dtype: worst, f"{dtype}-spread": spread}
    return differences


def test_fusion_from_features_equals_fusion_through_the_frozen_backbones(place: Path, tmp_path: Path) -> None:
    """fp32: 1e-5 where features are stored as float32; float16 rounds them to 11 bits, which costs 5e-4 of the predictions' spread."""
    worst = run_ranks(1, compared, place, tmp_path)[0]
    print(worst)
    assert worst["float32"] < 1e-5
    assert 1e-5 < worst["float16"] < 2e-3 * worst["float16-spread"]
    assert worst["float32-spread"] > 1e-3  # predictions that are all alike would show nothing
    trace = json.loads((tmp_path / "official" / "fusion" / "jmt-seed0" / "trace-rank0.json").read_text())  # profile=true, too
    assert "aten::addmm" in {event.get("name") for event in trace["traceEvents"]}
