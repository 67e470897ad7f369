"""Everything about a submission that can be known to fail before it is submitted, each as one line with a remedy."""

from __future__ import annotations

import os
from pathlib import Path

from jmt_dist.cluster import site as sites
from jmt_dist.config import PRETRAINED, Recipe, Site
from jmt_dist.errors import UserError

CACHED = {"kinetics400": "r2plus1d_18-*.pth", "imagenet": "resnet18-*.pth", "imagenet-resnet50": "resnet50-*.pth"}
NAMED_WEIGHTS = (*CACHED, "none")
WIDTH = 512  # model.attention's, which takes torch


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with its paths made absolute: jobs start in another folder than the one it was written for."""
    data = recipe.data.model_copy(update={"shards": str(Path(recipe.data.shards).expanduser().resolve())})
    changes: dict[str, object] = {"data": data}
    for name in ("visual", "audio"):
        stage = getattr(recipe, name)
        if stage.weights not in NAMED_WEIGHTS:
            changes[name] = stage.model_copy(update={"weights": str(Path(stage.weights).expanduser().resolve())})
    return recipe.model_copy(update=changes)


def check(recipe: Recipe, site: Site, folds: list[str]) -> tuple[tuple[str, ...], str]:
    """The folds to run and the manifest's hash. Raises UserError for the first thing that would make a job fail.

    Checked: the site's fields, batches against ranks, weight files, backbones and heads, the shards' existence and geometry,
    that the folds exist, and that every split of each has at least one sample per rank.
    """
    sites.check(site)
    if site.executor == "local":
        sites.gpu_slots(site)
    _check_batches(recipe, sites.ranks(site))
    _check_weights(recipe, site)
    _check_models(recipe)
    return _check_shards(recipe, folds, sites.ranks(site))


def _check_weights(recipe: Recipe, site: Site) -> None:
    """Whether the weight files are there; their content is the job's to check, since that takes torch."""
    moved = any("TORCH_HOME" in line for line in site.environment)  # the job's cache is not ours
    for name in ("visual", "audio"):
        weights = getattr(recipe, name).weights
        if name not in recipe.stages or weights == "none":
            continue
        if weights not in CACHED:
            if not Path(weights).is_file():
                raise UserError(f"{name}.weights: there is no file {weights}", f"Use one of {', '.join(NAMED_WEIGHTS)}, or a file.")
        elif not moved and not list(weights_cache().glob(CACHED[weights])):
            raise UserError(
                f"the weights of {name}.weights={weights} are not in {weights_cache()}",
                "Run `python launch/fetch_weights.py` on a machine with a network; jobs never download.",
            )


def _check_models(recipe: Recipe) -> None:
    """What audio stage and fusion would refuse when they are made: after the stages before them, which take days."""
    for name, known in PRETRAINED.items():
        stage = getattr(recipe, name)
        if name not in recipe.stages:
            continue
        if stage.backbone not in known and ":" not in stage.backbone:
            raise UserError(f"there is no {name} backbone {stage.backbone}", f"Known: {', '.join(known)}; your own as module:name.")
        own = known.get(stage.backbone, "none")
        if stage.weights in CACHED and stage.weights != own:
            sentence = f"{name}.weights={stage.weights} fits another backbone than {name}.backbone={stage.backbone}"
            raise UserError(sentence, f"Take {own} or a file.")
        if stage.weights == "kinetics400" and recipe.visual.depth == 10:
            sentence = "kinetics400 weights are for visual.depth=18; there are none for depth 10"
            raise UserError(sentence, "Take visual.weights=none or a file.")
    heads = recipe.fusion.jmt.heads
    if "fusion" in recipe.stages and "jmt" in (recipe.fusion.model, *recipe.fusion.baselines) and WIDTH % heads:
        raise UserError(f"fusion.jmt.heads={heads} does not divide the width of {WIDTH}", "Take 1, 2, 4, 8 or 16 heads.")


def weights_cache() -> Path:
    """torch.hub's folder of weight files, by its own rules, without torch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser() / "hub" / "checkpoints"


def _check_batches(recipe: Recipe, ranks: int) -> None:
    from jmt_dist.train.division import micro_batch

    for name in ("visual", "audio"):
        if name in recipe.stages:
            stage = getattr(recipe, name)
            micro_batch(name, stage.batch, ranks, stage.accumulation)
    if "fusion" in recipe.stages:
        fusion = recipe.fusion
        if fusion.ranks > ranks:
            raise UserError(f"fusion.ranks={fusion.ranks} is more than the job's {ranks}", f"Set fusion.ranks={ranks} or 0.")
        # with fusion.ranks=0 as many ranks train as the batch allows; one of them it must allow
        micro_batch("fusion", fusion.batch, fusion.ranks or 1, fusion.accumulation)


def _check_shards(recipe: Recipe, wanted: list[str], ranks: int) -> tuple[tuple[str, ...], str]:
    from jmt_dist.data.shards import Part, fold_shards, open_folds, open_shards

    folder = Path(recipe.data.shards)
    manifest = open_shards(folder)
    folds = tuple(dict.fromkeys(wanted)) or tuple(open_folds(folder, recipe.folds).names)
    parts: tuple[Part, ...] = ("train", "validation", *(("test",) if recipe.evaluate.test else ()))
    for fold in folds:
        for part in parts:
            samples = fold_shards(folder, recipe.folds, fold, part).samples
            if part != "test" and samples < ranks:
                raise UserError(
                    f"the {part} part of fold `{fold}` has {samples} samples, fewer than the job's {ranks} ranks",
                    f"Use at most {samples} ranks (site.nodes, site.ranks_per_node).",
                )
    return folds, manifest.hash
