"""A run folder as the jobs leave it, with invented numbers."""

import json
import math

import numpy as np

from jmt_dist.config import Recipe
from jmt_dist.evaluate.bootstrap import interval
from jmt_dist.evaluate.metric import scores
from jmt_dist.evaluate.predict import write_predictions
from jmt_dist.recipe import build, dump, word_layer
from jmt_dist.track.compare import FOLDS
from jmt_dist.track.spool import Spool

UNITS = {"video1": 400, "video2_left": 300, "video2_right": 300, "10-60-1280x720": 900, "134": 250}
NOISE = {"jmt": 0.25, "visual": 0.45, "audio": 0.5}


def labels(seed):
    rng = np.random.default_rng(seed)
    found = {}
    for unit, rows in UNITS.items():
        va = np.stack([0.6 * np.sin(np.arange(rows) / 60 + rng.uniform(0, 6)) for _ in range(2)], axis=1).astype(np.float32)
        va[: rows // 20] = np.nan
        found[unit] = va
    return found


def summary(runs, truth):
    joined = np.concatenate(list(truth.values()))
    groups = np.concatenate([np.full(len(va), unit.split("_")[0]) for unit, va in truth.items()])
    each = [scores(np.concatenate(list(run.values())), joined) for run in runs]
    return {
        **{t: float(np.mean([getattr(one, t) for one in each])) for t in ("valence", "arousal", "average")},
        "seeds": [{"seed": i, **one.to_dict()} for i, one in enumerate(each)],
        "interval": interval(np.stack([np.concatenate(list(run.values())) for run in runs]), joined, groups, 200),
        "frames": each[0].frames,
    }


def make_fold(out, fold, seeds=3, baselines=("visual", "audio"), steps=400):
    """metrics.json, status.json, predictions and a spool with curves of one fold."""
    index = FOLDS.index(fold)
    truth, rng = labels(index), np.random.default_rng(100 + index)
    runs = {}
    for model in ("jmt", *baselines):
        runs[model] = [
            {u: (0.9 * np.nan_to_num(va) + rng.normal(0, NOISE[model], va.shape)).clip(-1, 1).astype(np.float32) for u, va in truth.items()}
            for _ in range(seeds)
        ]
        for seed, run in enumerate(runs[model]):
            write_predictions(out / fold / "evaluate" / f"{model}-seed{seed}" / "predictions.parquet", run, truth)
    metrics = {"fold": fold, "model": "jmt", **summary(runs["jmt"], truth), "units": len(UNITS)}
    metrics["baselines"] = {model: summary(runs[model], truth) for model in baselines}
    (out / fold / "metrics.json").write_text(json.dumps(metrics))
    (out / fold / "status.json").write_text(json.dumps({"fold": fold, "state": "done"}))
    spool = Spool(out / fold / "spool")
    spool.state("RUNNING")
    for stage in ("visual", "audio", *(f"fusion/jmt-seed{i}" for i in range(seeds))):
        pace = rng.uniform(80, 160)
        for step in range(0, steps, 5):
            loss = 0.4 + 1.6 * math.exp(-step / pace) + rng.normal(0, 0.05)
            spool.metrics({f"{stage}/train/loss": loss, f"{stage}/train/lr": 1e-3}, step)
        for step in range(50, steps, 50):
            spool.metrics({f"{stage}/val/ccc_mean": 0.65 * (1 - math.exp(-step / pace)) + rng.normal(0, 0.02)}, step)
    spool.state("FINISHED")
    spool.close()
    return metrics


def make_run(out, folds=FOLDS, words=("name=demo", "fusion.seeds=[0,1,2]", "fusion.baselines=[visual,audio]"), **fold):
    """A whole run folder; returns its metrics by fold."""
    out.mkdir(parents=True)
    dump(build(Recipe, [word_layer(word) for word in words]), out / "recipe.yaml")
    return {name: make_fold(out, name, baselines=("visual", "audio") if name == "official" else (), **fold) for name in folds}


def make_fixture_json(path):
    known = {"visual": (0.9, 0.4), "audio": (0.3, 0.88), "both": (0.92, 0.9)}
    ceiling = {name: {"valence": v, "arousal": a, "average": (v + a) / 2} for name, (v, a) in known.items()}
    path.write_text(json.dumps({"ceiling": {}, "ceiling_by_split": {"validation": ceiling}}))
    return path
