"""What a failure in the middle of a stage comes from: memory, or a shard; as one sentence and a remedy (DESIGN section 10)."""

from __future__ import annotations

import errno
import re

import torch

from jmt_dist.config import TrainOptions
from jmt_dist.data.feature_tars import AGAIN, feature_damage
from jmt_dist.data.shards import damage_of, read_manifest
from jmt_dist.errors import UserError
from jmt_dist.train.division import usable_ranks
from jmt_dist.train.plan import FoldPlan
from jmt_dist.train.ranks import world
from jmt_dist.train.results import finished
from jmt_dist.train.stop import Stopped

MEND = "Restore or make it again (shards/verify_shards.py finds every damaged shard); the same command then goes on where it stopped."
# of torch's allocators, of C++ (DALI passes its exceptions on as text), of CUDA and its libraries
_MEMORY = re.compile(r"not enough memory|can't allocate memory|cannot allocate memory|out of memory|bad_alloc|alloc_failed", re.IGNORECASE)


def explain(error: Exception, plan: FoldPlan, stage: str) -> Exception:
    """The error that a user can act on, where `error` is lack of memory or comes of a damaged shard; else `error` itself."""
    if isinstance(error, UserError | Stopped):  # a stop has seconds until the scheduler kills: nothing may be read for it
        return error
    if is_memory(error):
        return _out_of_memory(error, plan, stage)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" of {error.filename}" if error.filename else ""
        return UserError(f"{plan.fold} {stage}: no space is left on the file system{where}", "Make room; the same command goes on.")
    # reading every shard takes minutes: the reason must be in the log before
    print(f"{plan.fold} {stage}: {type(error).__name__}: {_first_line(error)}; looking for a damaged shard", flush=True)
    with plan.around.watch.paused():
        return damage(plan) or error


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def _out_of_memory(error: Exception, plan: FoldPlan, stage: str) -> UserError:
    where = f"{plan.fold} {stage}: out of memory on {plan.device}"
    if stage in ("features", "evaluate"):
        batch = plan.recipe.features.batch
        remedy = f"Try features.batch={batch // 2} (it changes no result)." if batch > 1 else "Give each rank more memory."
        return UserError(f"{where} with features.batch={batch}", remedy)
    options: TrainOptions = getattr(plan.recipe, stage)
    ranks = world()
    if stage == "fusion":
        ranks = usable_ranks(options.batch, min(world(), plan.recipe.fusion.ranks or world()), options.accumulation)
    micro = options.batch // (ranks * options.accumulation)
    smaller = next((n for n in range(2 * options.accumulation, options.batch + 1) if options.batch % (ranks * n) == 0), 0)
    remedy = f"Use more ranks, or a smaller {stage}.batch than {options.batch}."
    if smaller:
        parts = options.batch // (ranks * smaller)
        remedy = f"Try {stage}.accumulation={smaller}: micro-batches of {parts}, the step still over {options.batch}."
    return UserError(f"{where} with {micro} subsequences per rank and micro-batch ({_first_line(error)})", remedy)


def _first_line(error: Exception) -> str:
    words = str(error).strip().splitlines() or [type(error).__name__]
    return words[-1].strip()[:200] if "alloc" in words[-1] else words[0].strip()[:200]


def damage(plan: FoldPlan) -> UserError | None:
    """Names the first file of shards or features that is not as it was written; None where all are. Reads them whole: a second per GB."""
    for folder in sorted({tar.parent for shards in plan.parts.values() for tar in shards.tars}):
        packed = {shard.name: shard for shard in read_manifest(folder).shards}
        tars = sorted({tar for shards in plan.parts.values() for tar in shards.tars if tar.parent == folder})
        for reads in (False, True):  # sizes first: they are known at once
            for tar in tars:
                found = damage_of(tar, packed[tar.name], reads)
                if found:
                    return UserError(f"shard {tar} {found}", MEND)
    features = plan.folder / "features"
    read = [features] * (finished(features, plan.keys.get("features", "")) is not None)  # not those of other settings, still to be replaced
    for folder in (*read, *(done.parent for done in sorted(plan.folder.glob("finetune/*/features/done.json")))):
        found = feature_damage(folder, plan.parts)
        if found:
            return UserError(found, AGAIN)
    return None
