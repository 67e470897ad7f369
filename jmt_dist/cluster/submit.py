"""One submission from beginning to end: check, copy the code, create the runs, then hand the folds to a scheduler."""

from __future__ import annotations

import fcntl
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from jmt_dist.cluster import plan as plans
from jmt_dist.cluster import preflight, site, status
from jmt_dist.cluster.options import SubmitOptions
from jmt_dist.cluster.plan import Plan
from jmt_dist.cluster.share import check_sources
from jmt_dist.cluster.slurm import Array
from jmt_dist.cluster.snapshot import Snapshot, snapshot_folder, take_snapshot
from jmt_dist.config import Recipe, Site
from jmt_dist.errors import UserError
from jmt_dist.program import FAILED, OK, OMISSIONS
from jmt_dist.recipe import dump


def submit(
    options: SubmitOptions,
    recipe: Recipe,
    place: Site,
    function: str = plans.RUN_FOLD,
    compare: str = plans.COMPARE,
) -> int:
    """Submit a recipe's folds to a site; returns the program's exit code.

    Local: runs them here, 0 when all are done, 3 when some failed, 1 when all failed. SLURM: 0 once they are queued; with `wait`
    the same as local. Raises UserError, with nothing written, for whatever can be known beforehand.
    """
    os.umask(0o077)
    work = make_plan(options, recipe, place, function, compare if options.compare else "")
    _announce(work)
    if options.dry:
        return _dry(work)
    if not work.todo and (not work.compare or (work.out / "table1.csv").is_file()):
        print(f"nothing to do: all {len(work.folds)} folds are done")
        print(work.out)
        return OK
    make_folder(work.out)
    with alone(work.out):
        if work.todo:
            _check_no_live_jobs(work.out)
            work = _prepare(work)
        code = _dispatch(work)
    if options.wait and work.site.executor == "slurm" and work.todo:
        from jmt_dist.cluster.watch import watch

        return max(code, watch(work.out, lines=15), key=(OK, OMISSIONS, FAILED).index)
    print(work.out)
    return code


def make_plan(options: SubmitOptions, recipe: Recipe, place: Site, function: str, compare: str) -> Plan:
    """The checked plan of a submission; writes nothing."""
    recipe = preflight.absolute(recipe)
    folds, manifest = preflight.check(recipe, place, options.folds)
    out = Path(options.out or Path("runs") / recipe.name).expanduser().resolve()
    if place.executor == "slurm":
        site.check_path(out)
    if out.exists():
        if not out.is_dir():
            raise UserError(f"out={out} is a file", "Choose another out=.")
        plans.check_owner(out, writable=False)
    work = plans.work_hash(recipe, manifest)
    todo = tuple(fold for fold in folds if not status.is_done(out, fold, work))
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    share = tuple(Path(folder).expanduser().resolve() for folder in options.share)
    check_sources(share, folds)
    return Plan(out, recipe, place, folds, todo, work, stamp, out / "snapshot", function, compare, share)


def _announce(work: Plan) -> None:
    ranks, place = site.ranks(work.site), work.site
    print(f"recipe {work.recipe.name}, stages {', '.join(work.recipe.stages)}; shards {work.recipe.data.shards}")
    print(
        f"site {place.name} ({place.executor}): {len(work.todo)} fold job(s), at most {place.parallel} at a time, "
        f"{ranks} rank(s) each on {place.nodes} node(s), time limit {place.time}, at most {place.tries} start(s)"
    )
    skipped = [fold for fold in work.folds if fold not in work.todo]
    if skipped:
        print(f"already done: {', '.join(skipped)}")
    if work.todo:
        print(f"folds: {', '.join(work.todo)}", flush=True)


def _dry(work: Plan) -> int:
    if work.site.executor == "slurm":
        from jmt_dist.cluster.slurm import of_plan, scripts

        work = replace(work, snapshot=snapshot_folder(work.out))
        for title, text in scripts([of_plan(work)], bool(work.compare)) if work.todo else []:
            print(f"\n### sbatch script of: {title}\n{text}")
    print(f"dry run: nothing was written; the run folder would be {work.out}")
    return OK


def make_folder(out: Path) -> None:
    """Make a run folder, private to its owner. Raises UserError where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be made: {error.strerror}", "Choose another out=.") from None
    if out.stat().st_uid == os.geteuid() and out.stat().st_mode & 0o077:  # made by another program, or before this rule
        out.chmod(0o700)
        print(f"made {out} private (chmod 700): jobs execute what lies there")
    plans.check_owner(out)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other submissions out of a folder. Raises UserError where one is at work there."""
    with (out / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "?"
            raise UserError(
                f"process {holder} is at work in {out}", f"Wait for it, or run: python launch/cancel_jobs.py out={shlex.quote(str(out))}"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _check_no_live_jobs(out: Path) -> None:
    from jmt_dist.cluster.control import live_jobs

    alive = live_jobs(out)
    if alive:
        names = ", ".join(f"{fold} (job {job})" for fold, job in alive.items())
        raise UserError(
            f"jobs of an earlier submission are still there: {names}", f"Run: python launch/cancel_jobs.py out={shlex.quote(str(out))}"
        )


def _prepare(work: Plan) -> Plan:
    from jmt_dist.cluster import tracking

    snapshot = take_snapshot(work.out)
    work = replace(work, snapshot=Path(snapshot.path))
    dump(work.recipe, work.out / "recipe.yaml")
    dump(work.site, work.out / "site.yaml")
    tracking.prepare(work, snapshot)
    print(describe(snapshot), flush=True)
    return work


def describe(snapshot: Snapshot) -> str:
    """The code of a submission, as a line."""
    commit = f"commit {snapshot.commit[:12]}" if snapshot.commit else "no git checkout"
    return f"code: {commit}{', with changes' if snapshot.dirty else ''}, copied to {snapshot.path}"


def _dispatch(work: Plan) -> int:
    if work.site.executor == "slurm" and work.todo:
        missing = _submit(work)
        print(f"see: python launch/show_status.py out={shlex.quote(str(work.out))}")
        return OMISSIONS if missing else OK
    states: dict[str, str] = {}
    if work.todo:
        from jmt_dist.cluster.local import Scheduler

        states = Scheduler(work).run()
    return _finish(work, states)


def _submit(work: Plan) -> str:
    """Submit the folds and their comparison; returns why there will be no comparison."""
    from jmt_dist.cluster import slurm

    array = slurm.of_plan(work)
    with slurm.submitting(work.site):
        identity, _ = slurm.submit_array(array)
    print(f"submitted array {identity}: {len(work.todo)} fold job(s)", flush=True)
    return submit_comparison(array, identity, work.out / "jobs.json", work.compare) if work.compare else ""


def submit_comparison(array: Array, identity: str, record: Path, compare: str) -> str:
    """Submit the job that compares what an array has done, and write it into `record`, beside the folds.

    Returns why there will be none, after saying so: no reason to do without the folds.
    """
    from jmt_dist.cluster import slurm

    try:
        with slurm.submitting(array.first.site):
            job = slurm.submit_comparison(array, identity, record.parent, compare)
    except UserError as error:  # a partition that takes no job without a GPU, say
        print(f"missing: the comparison: {error.sentence}")
        print(f"when the folds have ended, run: python launch/compare_runs.py out={shlex.quote(str(record.parent))}")
        return error.sentence
    status.write_json(record, {**status.read_json(record), "compare": job})
    print(f"submitted job {job}, which compares them when all have ended")
    return ""


def _finish(work: Plan, states: dict[str, str]) -> int:
    failed = [fold for fold in work.todo if states.get(fold) != "done"]
    if work.compare and len(failed) < len(work.folds):
        plans.resolve(work.compare)(work.out)
    entries = {job["fold"]: job for job in status.read_json(work.out / "jobs.json").get("jobs", [])}
    for fold in failed:
        reason = status.read_status(work.out, fold).get("reason", "")
        print(f"failed: {fold}: {reason}; log {entries.get(fold, {}).get('log', '')}")
    if not failed:
        print(f"all {len(work.folds)} folds are done")
        return OK
    return FAILED if len(failed) == len(work.folds) else OMISSIONS
