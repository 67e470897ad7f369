"""One fold in this very process: what `run_fold.py` does, with or without torchrun or srun around it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from jmt_dist.cluster import attempts, plan, preflight, rendezvous, status
from jmt_dist.cluster.job import node, raise_stop
from jmt_dist.cluster.lease import Lease
from jmt_dist.cluster.options import RunFoldOptions
from jmt_dist.cluster.snapshot import describe_code
from jmt_dist.config import Recipe, Site
from jmt_dist.errors import UserError
from jmt_dist.program import FAILED, OK
from jmt_dist.recipe import dump, load_recipe


def run_single(options: RunFoldOptions, recipe: Recipe, place: Site, function: str = plan.RUN_FOLD) -> int:
    """Run one fold; 1 where it was asked to stop before its end. Errors go on after they are recorded in the run folder.

    The number of ranks is what the environment says (WORLD_SIZE), not what the site says.
    """
    os.umask(0o077)
    first, world = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1"))
    place = place.model_copy(update={"nodes": 1, "ranks_per_node": world, "gpus_per_node": 0, "executor": "local"})
    recipe = preflight.absolute(recipe)
    _, manifest = preflight.check(recipe, place, [options.fold])
    out = Path(options.out or Path("runs") / recipe.name).expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan.check_owner(out, writable=False)
    os.environ.setdefault("OMP_NUM_THREADS", str(place.cpus_per_rank))
    if under_srun():
        from submitit.slurm.slurm import SlurmJobEnvironment

        rendezvous.choose_interface(SlurmJobEnvironment().hostnames)
    if first:
        print(f"fold {options.fold} of {recipe.name}, stages {', '.join(recipe.stages)}, {world} rank(s), in {out}", flush=True)
        describe_code(out)
    code = _run(recipe, place, options.fold, out, plan.work_hash(recipe, manifest), function, first)
    if first:
        print(out / options.fold)
    return code


def _keep_recipe(recipe: Recipe, out: Path) -> None:
    """Write the recipe beside the folds: whoever reads them, export_model.py say, builds the models by it.

    One that differs in its stages alone stays, and so do the stages of any: they are the run's, of which this may be a part.
    """
    path = out / "recipe.yaml"
    if path.exists():
        with contextlib.suppress(UserError):  # of another version
            recipe = recipe.model_copy(update={"stages": (known := load_recipe(path)).stages})
            if known == recipe:
                return
        print(f"{path} was of other settings, and is now of these", flush=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")  # folds may begin side by side
    dump(recipe, partial)
    os.replace(partial, path)


def _run(recipe: Recipe, place: Site, fold: str, out: Path, work: str, function: str, first: bool) -> int:
    from jmt_dist.train import stop

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.requested():
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for a save
        stop.request(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, ask)
    start = attempts.Start(f"run_fold.py {datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}", f"process {os.getpid()}")
    try:
        with _alone(out, fold, start) if first else _with_first(out, fold):
            if first and not (out / "recipe.yaml").exists():
                dump(place, out / "site.yaml")
                _keep_recipe(recipe, out)
            plan.resolve(function)(recipe, place, fold, out)
            if first and "fusion" in recipe.stages:  # all weights are of this recipe now; after a part of the stages, some may not be
                _keep_recipe(recipe, out)
    except stop.Stopped:
        if first:
            attempts.close_attempt(out, fold, start, "stopped", stop.requested())
            status.update_status(out, fold, state="stopped", reason=stop.requested())
            print(f"stopped by {stop.requested() or 'another rank'} after saving; the same command goes on from there", file=sys.stderr)
        return FAILED
    except Exception as error:
        if first:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            attempts.close_attempt(out, fold, start, "crashed", reason)
            status.update_status(out, fold, state="failed", reason=reason)
        raise
    if first:
        attempts.close_attempt(out, fold, start, "done")
        status.update_status(out, fold, state="done", work=work, reason="")
    return OK


@contextlib.contextmanager
def _alone(out: Path, fold: str, start: attempts.Start) -> Iterator[None]:
    """Rank 0: the fold's folder is this process's alone. Under srun, which names no port, it then tells the other ranks one."""

    def waiting(who: str) -> None:
        print(f"{fold}: {who} is still at work here; waiting for it to end", flush=True)

    with Lease(out / fold, start.job, waiting, raise_stop):
        attempts.open_attempt(out, fold, start)
        changes = {"start": status.now(), "job": start.job, "node": node(), "try": 1}
        status.update_status(out, fold, state="running", reason="", **changes)
        if under_srun():
            nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
            rendezvous.publish(out / fold, _slurm_start(), rendezvous.address(node(), nodes > 1))
        yield


@contextlib.contextmanager
def _with_first(out: Path, fold: str) -> Iterator[None]:
    if under_srun():
        rendezvous.await_port(out / fold, _slurm_start(), raise_stop)
    yield


def under_srun() -> bool:
    """Whether ranks were started by something that names no meeting place: srun does not, torchrun does."""
    return "RANK" in os.environ and "MASTER_PORT" not in os.environ


def _slurm_start() -> str:
    """What all ranks of one start under srun know, and no other start."""
    return f"{os.environ.get('SLURM_JOB_ID', '')} {os.environ.get('SLURM_RESTART_COUNT', '0')} {os.environ.get('SLURM_STEP_ID', '')}"
