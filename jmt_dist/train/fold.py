"""The whole pipeline of one fold: visual, audio, features, fusion, evaluate; what a rank of a fold job calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jmt_dist.config import STAGES, Recipe, Site
from jmt_dist.errors import UserError
from jmt_dist.track import names
from jmt_dist.track.facts import record_start
from jmt_dist.track.results import record_results
from jmt_dist.track.spool import Spool
from jmt_dist.track.tracker import Tracker, load_run
from jmt_dist.train import ranks, stop
from jmt_dist.train.backbone import audio_stage, visual_stage
from jmt_dist.train.describe import saturation
from jmt_dist.train.extract import extract
from jmt_dist.train.finetune import finetune_folder, finetune_key, finetune_stage, finetuned_features
from jmt_dist.train.fuse import fusion_folder, fusion_stage, stored_features
from jmt_dist.train.plan import FoldPlan, claim, open_parts
from jmt_dist.train.report import Status, now
from jmt_dist.train.score import TARGETS, evaluate
from jmt_dist.train.stage import Stage, Surroundings, done, finished, train
from jmt_dist.train.stored import require_whole
from jmt_dist.train.trouble import damage, explain, is_memory
from jmt_dist.train.watch import Watch

READ_SHARDS = ("visual", "audio", "features")


def run_fold(recipe: Recipe, site: Site, fold: str, out: Path) -> None:
    """Run the recipe's stages of one fold in `<out>/<fold>`; stages that are done with the same key are skipped.

    Every rank calls it, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set (or none of them: one process).
    Raises Stopped after saving where a stop was requested, and UserError for what the user can mend.
    """
    torch.set_num_threads(site.cpus_per_rank)
    device = ranks.choose_device(site.device)
    ranks.start(device)
    folder = Path(out) / fold
    folder.mkdir(parents=True, exist_ok=True)
    status = Status(folder, fold)
    status.set(state="running", start=now(), reason="")
    spool = folder / "spool" if ranks.rank() == 0 else None  # a spool without a folder drops what it is given
    watch = Watch(site.hang_seconds, folder, status.failed)
    with Tracker(spool, *(load_run(spool) if spool else ("", "")), site.system_seconds) as tracker, watch:
        try:
            manifest, parts = open_parts(recipe, site, fold)
            hashes = {"manifest": parts["train"].manifest_hash, **{f"fold.{part}": shards.index_hash for part, shards in parts.items()}}
            record_start(tracker.spool, Path(out), recipe.model_dump(mode="json"), hashes)
            around = Surroundings(recipe.engine, device, tracker.spool.metrics, status.progress, recipe.profile, watch)
            plan = FoldPlan(recipe, site, fold, folder, device, manifest, parts, around)
            watch.damage = lambda: damaged.sentence if (damaged := damage(plan)) else ""
            for name in STAGES:
                if name in recipe.stages:
                    _run_stage(name, plan, tracker.spool)
        except stop.Stopped as reason:
            status.set(state="stopped", reason=str(reason))
            raise
        except Exception as error:
            settled = watch.settle(error)
            if settled is error:
                raise
            raise settled from error
        status.set(state="done")


def _run_stage(name: str, plan: FoldPlan, spool: Spool) -> None:
    plan.around.watch.beat(f"{name}, before its first batch")
    try:
        _between(plan)
        if plan.site.staging and name in READ_SHARDS and not _finished(plan, name):
            plan.stage_in()  # not for stages that are done or linked: a sweep's variants read no shard
        _STAGES[name](plan, spool)
    except Exception as error:
        explained = explain(error, plan, name)
        if explained is error:
            raise
        raise explained from error


def _finished(plan: FoldPlan, name: str) -> bool:
    """Whether a stage is done, as the first rank sees it: on a network file system others may see what it wrote later. Collective."""
    key = plan.key(name)  # by every rank: where it cannot be made, of lost initial weights, all say so
    return bool(ranks.from_first(finished(plan.folder / name, key) is not None if ranks.rank() == 0 else None))


def _between(plan: FoldPlan) -> None:
    """Between stages: act on a stop request, in agreement of all ranks."""
    if ranks.any_rank(bool(stop.requested()), plan.device):
        raise stop.Stopped(stop.requested() or "another rank was asked to stop")


def _train(plan: FoldPlan, name: str, folder: Path, key: str, make: Callable[[], Stage]) -> None:
    if ranks.from_first(done(folder, key) is not None if ranks.rank() == 0 else None):
        if ranks.rank() == 0:
            print(f"{plan.fold} {name}: already done", flush=True)
        return
    claim(folder, key)
    train(make(), plan.around)


def _visual(plan: FoldPlan, spool: Spool) -> None:
    _train(plan, "visual", plan.folder / "visual", plan.key("visual"), lambda: visual_stage(plan))


def _audio(plan: FoldPlan, spool: Spool) -> None:
    _train(plan, "audio", plan.folder / "audio", plan.key("audio"), lambda: audio_stage(plan))


def _features(plan: FoldPlan, spool: Spool) -> None:
    for name in ("visual", "audio"):
        if not _finished(plan, name):
            raise UserError(f"the {name} stage of this recipe is not done in {plan.folder}", f"Run stages=[{name}] first.")
    extract(plan)


def _fusion(plan: FoldPlan, spool: Spool) -> None:
    require_whole(plan, plan.folder / "features", ("train", "validation"))
    train_set, validation_set = stored_features(plan, "train"), stored_features(plan, "validation")
    for model, seed in plan.fusions():
        folder, key = fusion_folder(plan, model, seed), plan.fusion_key(model, seed)
        _between(plan)
        _train(
            plan, f"fusion/{model}-seed{seed}", folder, key,
            lambda model=model, seed=seed: fusion_stage(plan, model, seed, train_set, validation_set),  # type: ignore[misc]
        )  # fmt: skip
        if ranks.rank() == 0:
            saturation(plan, model, seed, validation_set)
    if plan.recipe.finetune:
        _finetune(plan)


def _finetune(plan: FoldPlan) -> None:
    """The end-to-end training of each seed, a part of the fusion stage with options of its own."""
    for seed in plan.recipe.fusion.seeds:
        name, folder, key = f"finetune/{plan.recipe.fusion.model}-seed{seed}", finetune_folder(plan, seed), finetune_key(plan, seed)
        _between(plan)
        with _batch_of("finetuning", plan):
            _train(plan, name, folder, key, lambda seed=seed: finetune_stage(plan, seed))  # type: ignore[misc]
        with _batch_of("features", plan):
            finetuned_features(plan, seed)


@contextmanager
def _batch_of(stage: str, plan: FoldPlan) -> Iterator[None]:
    """Memory that runs out inside is blamed on the batch of `stage`; all else is explained where the stage around it ends."""
    try:
        yield
    except Exception as error:
        if is_memory(error):
            raise explain(error, plan, stage) from error
        raise


def _evaluate(plan: FoldPlan, spool: Spool) -> None:
    plan.around.status(stage="evaluate", epoch=0, step=0, steps=1, score=None)
    with plan.around.watch.paused():
        metrics = evaluate(plan)
    if metrics:
        plan.around.status(stage="evaluate", epoch=0, step=1, steps=1, score=metrics["average"])
        spool.metrics(_results(metrics), 0)
        record_results(spool, plan.folder)


def _results(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A fold's scores under the names a person looks for (`track.names`)."""

    def of(prefix: str, part: Mapping[str, Any]) -> dict[str, float]:
        return names.ccc(prefix, [part[target] for target in TARGETS])

    found = of(names.RESULT, metrics)
    if "smoothed" in metrics:
        found |= of(f"{names.RESULT}/smoothed", metrics["smoothed"])
    for modality, part in metrics.get("withheld", {}).items():
        found |= of(f"{names.RESULT}/without_{modality}", part)
    for model, part in metrics["baselines"].items():
        found |= of(f"baseline/{model}", part)
    return found


_STAGES: dict[str, Callable[[FoldPlan, Spool], None]] = {
    "visual": _visual,
    "audio": _audio,
    "features": _features,
    "fusion": _fusion,
    "evaluate": _evaluate,
}
