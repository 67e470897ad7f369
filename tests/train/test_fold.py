"""A whole fold, from shards to metrics, on real processes: one and two ranks, fp32 and bf16 autocast."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmt_dist.config import FusionOptions, PackOptions
from jmt_dist.data.pack import pack
from jmt_dist.evaluate.predict import read_predictions
from jmt_dist.model.zoo import make_fusion
from jmt_dist.track.spool import read_metrics, read_records
from tests.data.tree import labels, write_unit
from tests.ranks import run_ranks

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
ROWS = 70  # a segment and a bit: every unit has two samples per phase, the second mostly padding


def folds(rank: int, folder: Path, precision: str) -> tuple[dict[str, int], dict[str, int]]:
    """Run the fold, and once more; returns when each result was written, after the first time and after the second."""
    return fold(folder, precision), fold(folder, precision)


def stopped(rank: int, folder: Path, precision: str) -> str:
    """The fold, asked to stop after the first step of its visual stage; it has no time to look for damaged shards then."""
    from jmt_dist.train import report, stop, trouble

    trouble.damage = None  # type: ignore[assignment]

    progress = report.Status.progress

    def ask(self: report.Status, **values: object) -> None:
        progress(self, **values)
        if values["step"] == 1:
            stop.request("test")

    report.Status.progress = ask  # type: ignore[method-assign]
    try:
        fold(folder, precision)
    except stop.Stopped as reason:
        return str(reason)
    return ""


def interrupted(rank: int, folder: Path) -> tuple[str, int, bool]:
    """Evaluation of a whole fold anew, where the first rank is asked to stop after its first predictions; then to the end.

    Returns why it stopped, how often this rank predicted until then, and whether the scores are as they were.
    """
    import torch.distributed as dist

    from jmt_dist.train import score, stop

    metrics = folder / "out" / "official" / "metrics.json"
    before, predict, calls, reason = json.loads(metrics.read_text()), score._predict, [], ""

    def ask(*arguments: Any) -> Any:
        calls.append(1)
        stop.request("test")
        return predict(*arguments)

    dist.barrier()
    if rank == 0:
        metrics.unlink()
        (folder / "out" / "official" / "evaluate" / "done.json").unlink()
    dist.barrier()
    score._predict = ask
    try:
        fold(folder, "fp32")
    except stop.Stopped as error:
        reason = str(error)
    assert not metrics.exists()
    dist.barrier()
    score._predict = predict
    stop.clear()
    fold(folder, "fp32")
    return reason, len(calls), json.loads(metrics.read_text()) == before


def fold(folder: Path, precision: str) -> dict[str, int]:
    from jmt_dist.recipe import load_recipe, load_site
    from jmt_dist.train.fold import run_fold

    words = [
        f"data.shards={folder}/shards",
        f"engine.precision={precision}",
        f"engine.zero={int(precision == 'fp32')}",
        f"fusion.modality_dropout={0.3 if precision == 'autocast' else 0.0}",
        "visual.size=16",
        "evaluate.bootstrap=20",
    ]
    words += ["visual.batch=2", "audio.batch=2", "features.batch=3", "fusion.batch=4", "fusion.seeds=[0]", "fusion.baselines=[visual]"]
    words += ["visual.max_steps=2", "audio.max_steps=2", "fusion.max_epochs=1", "evaluate.offsets=[1]", "features.offsets=[1]"]
    words += ["fusion.validation_offsets=[1]", "fusion.offsets_per_epoch=1"]
    site = [f"staging={folder}/local"] if precision == "fp32" else []
    run_fold(load_recipe(RECIPE, words), load_site(None, site), "official", folder / "out")
    results = (path for name in ("best.safetensors", "metrics.json", "done.json") for path in (folder / "out").rglob(name))
    return {str(path): path.stat().st_mtime_ns for path in results}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fold")
    for k in range(7):
        write_unit(folder / "tree", f"u{k}", ROWS, k, "Train_Set" if k < 5 else "Validation_Set")
    pack(PackOptions(source=str(folder / "tree"), out=str(folder / "shards"), workers=1), say=lambda line: None)
    return folder


@pytest.mark.parametrize(("world", "precision"), [pytest.param(2, "fp32", marks=pytest.mark.slow), (1, "autocast")])
def test_a_fold_runs_from_shards_to_metrics_and_is_not_repeated(place: Path, tmp_path: Path, world: int, precision: str) -> None:
    (tmp_path / "shards").symlink_to(place / "shards")
    if precision == "autocast":  # begun by two ranks, finished by one
        assert all(run_ranks(2, stopped, tmp_path, precision))
    first, second = run_ranks(world, folds, tmp_path, precision)[0]
    copies = {path.name: path.stat().st_size for path in (tmp_path / "local").glob("jmt-*/*.tar")}
    assert copies == ({path.name: path.stat().st_size for path in (place / "shards").glob("*.tar")} if precision == "fp32" else {})
    assert second == first and len(first) == 4 + 1 + 6  # of two backbones, two fusions; of them, features and evaluate
    official = tmp_path / "out" / "official"
    metrics = json.loads((official / "metrics.json").read_text())
    assert metrics["frames"] == 2 * ROWS and metrics["units"] == 2 and set(metrics["baselines"]) == {"visual"}
    assert all(math.isfinite(metrics[target]) for target in ("valence", "arousal", "average"))
    _the_result_says_what_the_model_is(official, metrics)
    rows = read_predictions(official / "evaluate" / "jmt-seed0" / "predictions.parquet")
    assert set(rows) == {"u5", "u6"}
    for k in (5, 6):
        found = rows[f"u{k}"]
        assert found.va.shape == (ROWS, 2) and np.isfinite(found.va).all()
        np.testing.assert_array_equal(found.labels, labels(ROWS, k))  # every frame has the label of its own row
    assert json.loads((official / "status.json").read_text())["state"] == "done"
    sent = {record["a"] for _, record in read_records(official / "spool") if record and "a" in record}
    assert {"metrics.json", "costs.json", "figures/learning-curves.png", "figures/predictions.png", "fusion/jmt-seed0/done.json"} <= sent
    assert {f"evaluate/{name}-seed0/predictions.parquet" for name in ("jmt", "visual")} <= sent
    assert all((official / name).is_file() for name in sent)
    if world == 2:
        assert run_ranks(2, interrupted, tmp_path) == [("test", 1, True), ("another rank was asked to stop", 0, True)]


def _the_result_says_what_the_model_is(official: Path, metrics: dict[str, Any]) -> None:
    """Parameters, saturation, what a missing modality costs, and times, which are kept apart from what a recipe determines."""
    own = {"jmt": metrics, "visual": metrics["baselines"]["visual"]}
    for model, part in own.items():
        assert part["parameters"] == sum(p.numel() for p in make_fusion(FusionOptions(), model).parameters())
        curves = read_metrics(official / "spool")
        for when in ("start", "end"):
            share = dict(curves[f"fusion/{model}-seed0/attention/saturation_{when}"])[0]
            assert 0 <= share <= 1 and part["saturation"][when] == pytest.approx(share)
    assert "withheld" not in own["visual"] and set(metrics["withheld"]) == {"audio", "visual"}
    for part in metrics["withheld"].values():
        assert part["drop"]["average"] == pytest.approx(metrics["average"] - part["average"])
    costs = json.loads((official / "costs.json").read_text())
    assert all(costs[model]["ms_per_1000_clips"] > 0 and costs[model]["parameters"] == own[model]["parameters"] for model in own)
