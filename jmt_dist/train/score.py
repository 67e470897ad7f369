"""The evaluate stage: dense predictions of every fusion model of a fold, their scores and files (DESIGN sections 9 and 12)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from jmt_dist.data.features import FeatureSet
from jmt_dist.data.geometry import end_frames
from jmt_dist.errors import UserError
from jmt_dist.evaluate.bootstrap import interval
from jmt_dist.evaluate.metric import Scores, scores
from jmt_dist.evaluate.predict import UnitRows, dense, write_predictions
from jmt_dist.evaluate.smooth import Filter, smooth
from jmt_dist.train import stop
from jmt_dist.train.describe import ms_per_1000_clips, parameters, saturation, trained
from jmt_dist.train.engine import autocast
from jmt_dist.train.finetune import finetune_folder, finetune_key, finetuned, read_finetuned
from jmt_dist.train.fuse import fusion_folder, predict_all, stored_features
from jmt_dist.train.plan import FoldPlan, claim, make_key
from jmt_dist.train.ranks import apart, from_first, rank
from jmt_dist.train.stage import finished, write_json
from jmt_dist.train.stored import require_whole

MODALITIES = ("audio", "visual")  # also the fusion models that read one alone: nothing to withhold from them
TARGETS = ("valence", "arousal", "average")
Rows = dict[str, NDArray[np.float32]]


def evaluate(plan: FoldPlan) -> dict[str, Any]:
    """Score the fold on its validation units; writes predictions and `<fold>/metrics.json`, and returns the metrics on rank 0.

    Raises Stopped, on every rank, where the first is asked to stop before the scores: the next start evaluates anew.
    """
    folder = plan.folder / "evaluate"
    tuned = [finetune_key(plan, seed) for seed in plan.recipe.fusion.seeds] if plan.recipe.finetune else []
    key = make_key("evaluate", plan.recipe.evaluate.model_dump(), [plan.fusion_key(*pair) for pair in plan.fusions()], *tuned)
    weights = _weights(plan) if rank() == 0 else {}
    done = from_first(_done(finished(folder, key), weights) if rank() == 0 else None)
    if done is not None:
        return dict(done["metrics"])
    left = from_first(_untrained(plan) if rank() == 0 else "")
    if left:
        raise UserError(f"the fusion of {left} is not done in {plan.folder}", "Run stages=[fusion] first.")
    parts = [part for part in plan.parts if part != "train"]
    seeds = plan.recipe.fusion.seeds if plan.recipe.finetune else []
    for features in (plan.folder / "features", *(finetune_folder(plan, seed) / "features" for seed in seeds)):
        require_whole(plan, features, parts)
    claim(folder, key)
    metrics: dict[str, Any] = {}

    def work(on: Callable[[], None]) -> None:
        def go_on() -> None:
            on()
            if stop.requested():
                raise stop.Stopped

        with contextlib.suppress(stop.Stopped):  # said to all ranks below
            metrics.update(_evaluate(plan, go_on))
            write_json(plan.folder / "metrics.json", metrics)
            write_json(folder / "done.json", {"key": key, "metrics": metrics, "weights": weights})

    # the trainings of a zoo, test units included, take a CPU longer than a collective may
    apart(work if rank() == 0 else None, lambda place: plan.around.watch.beat(f"evaluate{place and ', '}{place}", alone=not place))
    if not from_first(bool(metrics)):
        raise stop.Stopped(stop.requested() or "another rank was asked to stop")
    return metrics


def _weights(plan: FoldPlan) -> dict[str, str]:
    """The digests of the weights that are evaluated, by their folder, of those trainings that are done."""
    recipe = plan.recipe
    folders = {fusion_folder(plan, *pair): plan.fusion_key(*pair) for pair in plan.fusions()}
    folders |= {finetune_folder(plan, seed): finetune_key(plan, seed) for seed in recipe.fusion.seeds if recipe.finetune}
    results = {str(folder.relative_to(plan.folder)): finished(folder, key) for folder, key in folders.items()}
    return {name: str(result["weights"]) for name, result in results.items() if result and result.get("weights")}


def _done(result: dict[str, Any] | None, weights: Mapping[str, str]) -> dict[str, Any] | None:
    """The result, unless it is of other weights: a stage whose folder was removed is trained again under the same key."""
    then: dict[str, str] = (result or {}).get("weights", {})
    return None if any(then.get(name, now) != now for name, now in weights.items()) else result


def _untrained(plan: FoldPlan) -> str:
    """The first fusion of the recipe that is not trained, in words; empty where all are."""
    left = (pair for pair in plan.fusions() if finished(fusion_folder(plan, *pair), plan.fusion_key(*pair)) is None)
    return next((f"model {model} with seed {seed}" for model, seed in left), "")


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


def _evaluate(plan: FoldPlan, on: Callable[[], None]) -> dict[str, Any]:
    validation = stored_features(plan, "validation")
    test = stored_features(plan, "test") if "test" in plan.parts else None
    units = _units(plan, validation)
    labels = unit_labels(validation, units)
    runs: dict[str, Runs] = {}
    for model, seed in plan.fusions():
        net = trained(plan, model, seed)
        one = runs.setdefault(model, Runs(parameters(net)))
        _add(plan, one, model, seed, net, (validation, test), labels, on)
        one.saturation.append(saturation(plan, model, seed, validation))
    for seed in plan.recipe.fusion.seeds if plan.recipe.finetune else []:
        name = f"{plan.recipe.fusion.model}-finetuned"
        sets = [read_finetuned(plan, seed, part) if part in plan.parts else None for part in ("validation", "test")]
        assert sets[0] is not None
        net = finetuned(plan, seed).fusion.to(plan.device)
        _add(plan, runs.setdefault(name, Runs(parameters(net))), name, seed, net, (sets[0], sets[1]), labels, on)
    # apart from the scores: those are the same in every run of a recipe, times are not
    write_json(plan.folder / "costs.json", {model: _cost(plan, one) for model, one in runs.items()})
    main = plan.recipe.fusion.model
    found = {model: _summary(plan, one, labels, units) for model, one in runs.items()}
    return {"fold": plan.fold, "model": main, **found.pop(main), "units": len(units), "baselines": found}


@dataclass
class Runs:
    """The trainings of one fusion model on a fold, by seed."""

    parameters: int  # of the fusion alone, of a finetuned one too
    seeds: list[int] = field(default_factory=list)
    predictions: list[Rows] = field(default_factory=list)
    saturation: list[dict[str, float]] = field(default_factory=list)
    withheld: dict[str, list[Rows]] = field(default_factory=dict)  # the modality that is missing, predictions by seed
    ms: float = 0.0


def _add(
    plan: FoldPlan,
    runs: Runs,
    name: str,
    seed: int,
    net: nn.Module,
    sets: tuple[FeatureSet, FeatureSet | None],
    labels: Rows,
    on: Callable[[], None],
) -> None:
    """Write one training's predictions of validation and test, and keep those of the validation units, withheld modalities too.

    `on` is called after each of them, and may raise to end the evaluation.
    """
    folder, (validation, test) = plan.folder / "evaluate" / f"{name}-seed{seed}", sets
    predictions = _predict(plan, net, validation)
    write_predictions(folder / "predictions.parquet", predictions, labels)
    on()
    if test is not None:
        write_predictions(folder / "test.parquet", _predict(plan, net, test), {})
        on()
    runs.seeds.append(seed)
    runs.predictions.append(predictions)
    for modality in plan.recipe.evaluate.withhold if name not in MODALITIES else ():
        runs.withheld.setdefault(modality, []).append(_predict(plan, net, validation, modality))
        on()
    runs.ms = runs.ms or ms_per_1000_clips(net, plan.device)


def _cost(plan: FoldPlan, one: Runs) -> dict[str, Any]:
    return {
        "parameters": one.parameters,
        "ms_per_1000_clips": one.ms,
        "device": plan.device.type,
        "threads": torch.get_num_threads(),
    }


def _predict(plan: FoldPlan, net: nn.Module, features: FeatureSet, withheld: str = "") -> Rows:
    """Dense predictions of a fusion model, clipped to the scale of the labels; `withheld`: the modality that is missing."""
    offsets = plan.recipe.evaluate.offsets
    chosen = features.select(offsets)
    with autocast(plan.recipe.engine.precision, plan.device):
        va = predict_all(net.to(plan.device), chosen, plan.device, withheld)
    found = dense(va, chosen.ident, offsets, _units(plan, chosen), plan.recipe.label)
    return {name: np.clip(rows, -1, 1) for name, rows in found.items()}


def _join(rows: Mapping[str, NDArray[Any]], units: list[UnitRows]) -> NDArray[Any]:
    return np.concatenate([rows[unit.name] for unit in units])


def _summary(plan: FoldPlan, one: Runs, labels: Rows, units: list[UnitRows]) -> dict[str, Any]:
    """Scores over all labelled frames: the mean over seeds, each seed, the interval over videos; smoothed, and with a modality withheld."""
    truth, runs, options = _join(labels, units), one.predictions, plan.recipe.evaluate
    each = [scores(_join(run, units), truth) for run in runs]
    videos = np.concatenate([np.full(unit.rows, plan.manifest.units[unit.index].video) for unit in units])
    found: dict[str, Any] = {
        **_mean(each),
        "seeds": [{"seed": seed, **score.to_dict()} for seed, score in zip(one.seeds, each, strict=True)],
        "interval": interval(np.stack([_join(run, units) for run in runs]), truth, videos, options.bootstrap, plan.recipe.seed),
        "frames": each[0].frames,
        "parameters": one.parameters,
    }
    if one.saturation and one.saturation[0]:
        found["saturation"] = {when: float(np.mean([shares[when] for shares in one.saturation])) for when in ("start", "end")}
    if one.withheld:
        found["withheld"] = {modality: _without(found, runs, units, truth) for modality, runs in one.withheld.items()}
    filters = Filter(options.smooth_valence_kind, options.smooth_valence), Filter(options.smooth_arousal_kind, options.smooth_arousal)
    if max(how.window for how in filters) > 1:
        smoothed = [scores(_join({name: smooth(va, *filters) for name, va in run.items()}, units), truth) for run in runs]
        found["smoothed"] = {"filters": [str(how) for how in filters], **_mean(smoothed)}
    return found


def _mean(each: list[Scores]) -> dict[str, float]:
    return {target: float(np.mean([getattr(one, target) for one in each])) for target in TARGETS}


def _without(whole: Mapping[str, Any], runs: list[Rows], units: list[UnitRows], truth: NDArray[Any]) -> dict[str, Any]:
    """Scores where a modality is withheld, and how much lower than with both they are."""
    found = _mean([scores(_join(run, units), truth) for run in runs])
    return {**found, "drop": {target: whole[target] - found[target] for target in TARGETS}}
