"""The evaluate stage: dense predictions of every fusion model of a fold, their scores and files (DESIGN sections 9 and 12)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from jmt_dist.data.features import FeatureSet
from jmt_dist.data.geometry import end_frames
from jmt_dist.evaluate.bootstrap import interval
from jmt_dist.evaluate.metric import Scores, scores
from jmt_dist.evaluate.predict import UnitRows, dense, write_predictions
from jmt_dist.evaluate.smooth import Filter, smooth
from jmt_dist.model.zoo import make_fusion
from jmt_dist.train.engine import autocast
from jmt_dist.train.finetune import finetune_key, finetuned, read_finetuned
from jmt_dist.train.fuse import fusion_folder, predict_all, stored_features
from jmt_dist.train.plan import FoldPlan, claim, make_key
from jmt_dist.train.ranks import barrier, rank
from jmt_dist.train.stage import finished, write_json
from jmt_dist.train.weights import load_weights

TARGETS = ("valence", "arousal", "average")
Rows = dict[str, NDArray[np.float32]]


def evaluate(plan: FoldPlan) -> dict[str, Any]:
    """Score the fold on its validation units; writes predictions and `<fold>/metrics.json`, and returns the metrics on rank 0."""
    folder = plan.folder / "evaluate"
    tuned = [finetune_key(plan, seed) for seed in plan.recipe.fusion.seeds] if plan.recipe.finetune else []
    key = make_key("evaluate", plan.recipe.evaluate.model_dump(), [plan.fusion_key(*pair) for pair in plan.fusions()], *tuned)
    done = finished(folder, key)
    if done is not None:
        return dict(done["metrics"])
    claim(folder, key)
    metrics: dict[str, Any] = {}
    if rank() == 0:
        metrics = _evaluate(plan)
        write_json(plan.folder / "metrics.json", metrics)
        write_json(folder / "done.json", {"key": key, "metrics": metrics})
    barrier()
    return metrics


def _units(plan: FoldPlan, features: FeatureSet) -> list[UnitRows]:
    present = np.unique(features.ident[:, 0])
    return [UnitRows(int(index), plan.manifest.units[index].name, plan.manifest.units[index].rows) for index in present]


def unit_labels(features: FeatureSet, units: list[UnitRows]) -> Rows:
    """Labels [rows, 2] of every frame of each unit (NaN = none): each frame is the end of exactly one clip of one sample."""
    names = {unit.index: unit.name for unit in units}
    found = {unit.name: np.full((unit.rows, 2), np.nan, np.float32) for unit in units}
    for ident, labels in zip(features.ident, features.labels, strict=True):
        rows = found[names[int(ident[0])]]
        frames = end_frames(int(ident[1]), int(ident[2])) - 1
        inside = frames < len(rows)
        rows[frames[inside]] = labels[inside]
    return found


def _evaluate(plan: FoldPlan) -> dict[str, Any]:
    validation = stored_features(plan, "validation")
    test = stored_features(plan, "test") if "test" in plan.parts else None
    units = _units(plan, validation)
    labels = unit_labels(validation, units)
    runs: dict[str, list[Rows]] = {}
    seeds: dict[str, list[int]] = {}
    for model, seed in plan.fusions():
        net = make_fusion(plan.recipe.fusion.model_copy(update={"model": model}))
        load_weights(net, fusion_folder(plan, model, seed) / "best.safetensors")
        runs.setdefault(model, []).append(_predicted(plan, f"{model}-seed{seed}", net, validation, test, labels))
        seeds.setdefault(model, []).append(seed)
    for seed in plan.recipe.fusion.seeds if plan.recipe.finetune else []:
        name = f"{plan.recipe.fusion.model}-finetuned"
        sets = [read_finetuned(plan, seed, part) if part in plan.parts else None for part in ("validation", "test")]
        assert sets[0] is not None
        found = _predicted(plan, f"{name}-seed{seed}", finetuned(plan, seed).fusion, sets[0], sets[1], labels)
        runs.setdefault(name, []).append(found)
        seeds.setdefault(name, []).append(seed)
    main = plan.recipe.fusion.model
    summary = _summary(plan, runs[main], seeds[main], labels, units, plan.recipe.evaluate.bootstrap)
    baselines = {m: _summary(plan, runs[m], seeds[m], labels, units, plan.recipe.evaluate.bootstrap) for m in runs if m != main}
    return {"fold": plan.fold, "model": main, **summary, "units": len(units), "baselines": baselines}


def _predicted(plan: FoldPlan, name: str, net: nn.Module, validation: FeatureSet, test: FeatureSet | None, labels: Rows) -> Rows:
    """Write one training's predictions, and return those of the validation units."""
    folder = plan.folder / "evaluate" / name
    predictions = _predict(plan, net, validation)
    write_predictions(folder / "predictions.parquet", predictions, labels)
    if test is not None:
        write_predictions(folder / "test.parquet", _predict(plan, net, test), {})
    return predictions


def _predict(plan: FoldPlan, net: nn.Module, features: FeatureSet) -> Rows:
    """Dense predictions of a fusion model, clipped to the scale of the labels."""
    offsets = plan.recipe.evaluate.offsets
    chosen = features.select(offsets)
    with autocast(plan.recipe.engine.precision, plan.device):
        va = predict_all(net.to(plan.device), chosen, plan.device)
    found = dense(va, chosen.ident, offsets, _units(plan, chosen), plan.recipe.label)
    return {name: np.clip(rows, -1, 1) for name, rows in found.items()}


def _join(rows: Mapping[str, NDArray[Any]], units: list[UnitRows]) -> NDArray[Any]:
    return np.concatenate([rows[unit.name] for unit in units])


def _summary(plan: FoldPlan, runs: list[Rows], seeds: list[int], labels: Rows, units: list[UnitRows], rounds: int) -> dict[str, Any]:
    """Scores over all labelled frames: the mean over seeds, each seed, the interval over videos, and the smoothed score."""
    truth = _join(labels, units)
    each = [scores(_join(run, units), truth) for run in runs]
    videos = np.concatenate([np.full(unit.rows, plan.manifest.units[unit.index].video) for unit in units])
    found: dict[str, Any] = {
        **_mean(each),
        "seeds": [{"seed": seed, **one.to_dict()} for seed, one in zip(seeds, each, strict=True)],
        "interval": interval(np.stack([_join(run, units) for run in runs]), truth, videos, rounds, plan.recipe.seed),
        "frames": each[0].frames,
    }
    options = plan.recipe.evaluate
    filters = Filter(options.smooth_valence_kind, options.smooth_valence), Filter(options.smooth_arousal_kind, options.smooth_arousal)
    if max(how.window for how in filters) > 1:
        smoothed = [scores(_join({name: smooth(va, *filters) for name, va in run.items()}, units), truth) for run in runs]
        found["smoothed"] = {"filters": [str(how) for how in filters], **_mean(smoothed)}
    return found


def _mean(each: list[Scores]) -> dict[str, float]:
    return {target: float(np.mean([getattr(one, target) for one in each])) for target in TARGETS}
