"""The MLflow runs of a submission, made before its jobs start: one parent, one child per fold (DESIGN section 12)."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path

from jmt_dist.cluster import control, slurm
from jmt_dist.cluster.graph import SHARED
from jmt_dist.cluster.plan import Plan
from jmt_dist.cluster.snapshot import Snapshot
from jmt_dist.cluster.status import read_json, read_status, update_status, write_json
from jmt_dist.config import Site
from jmt_dist.track.facts import describe_code

# accounting, or this machine's view of status.json, is behind: ask again later
LAGS_BEHIND = ("COMPLETED", "PENDING", "REQUEUED", "RESIZING", "RUNNING", "SUSPENDED")
ENDED_FROM_OUTSIDE = ("CANCELLED", "DEADLINE", "PREEMPTED", "TIMEOUT")


def store(out: Path, site: Site) -> str:
    """The tracking URI of a run folder: the site's, or one SQLite file beside the run folders."""
    home = out.resolve().parent
    return site.tracking_uri or f"sqlite:///{(home.parent if home.name == SHARED else home) / 'mlflow.db'}"


def sends(site: Site) -> bool:
    """Whether jobs of a site send to a store themselves. Under SLURM without a tracking URI they only spool."""
    return bool(site.tracking_uri) or site.executor == "local"


def prepare(plan: Plan, snapshot: Snapshot) -> None:
    """Make sure that the parent run and a child run per fold exist, and tell each fold's spool where it belongs.

    A second submission of the same work goes on with the runs of the first. Other work in the same folder gets runs of its
    own; the spools of before are kept beside as `spool-<n>`. Under SLURM without a tracking URI the jobs only spool (an
    SQLite file on a shared file system is unsafe), and the comparison job or `sync_tracking.py` writes the store.
    """
    uri = store(plan.out, plan.site)
    record = read_json(plan.out / "submission.json")
    same = record.get("work") == plan.work and record.get("uri") == uri and (plan.out / "parent_run.json").is_file()
    missing = [fold for fold in plan.folds if not (same and read_json(plan.out / fold / "spool" / "run.json").get("run_id"))]
    if missing:
        _create(plan, snapshot, uri, same, missing)
    write_json(plan.out / "submission.json", {"work": plan.work, "uri": uri, "submission": plan.submission})


def close_lost(out: Path) -> list[str]:
    """Record the end of folds whose job is gone although their status says that it goes on; returns them.

    A node that fails, or a job that is killed together with its batch script, leaves nobody to write it. What SLURM's
    accounting remembers decides between stopped (CANCELLED, TIMEOUT, …) and failed; without it: failed. The run in
    MLflow then follows the status (`track.sync`). Raises UserError where the scheduler does not answer.
    """
    jobs = read_json(out / "jobs.json")
    here = jobs.get("executor") == "slurm" or jobs.get("scheduler", {}).get("host") == socket.gethostname()
    if not jobs or not here:  # processes of another machine cannot be seen from this one
        return []
    alive = control.alive_states(jobs)
    found = []
    for entry in jobs.get("jobs", []):
        fold, job = str(entry["fold"]), str(entry["job"])
        state = read_status(out, fold).get("state")
        if fold in alive or state not in ("running", "waiting"):
            continue
        ended = slurm.sacct(job) if jobs.get("executor") == "slurm" else ""
        if ended in LAGS_BEHIND:  # it, or what is read here, lags behind: ask later
            continue
        reason = f"job {job} is gone{f': {ended}' if ended else ''}"
        update_status(out, fold, state="stopped" if ended in ENDED_FROM_OUTSIDE else "failed", reason=reason)
        found.append(fold)
    return found


def only_spool(plan: Plan) -> None:
    """Make no run now: whoever fills the store does. Spools of other work that lie in the folder are kept beside."""
    record = read_json(plan.out / "submission.json")
    if record and record.get("work") != plan.work:
        for fold in plan.folds:
            if (plan.out / fold / "spool").is_dir():
                _keep_aside(plan.out / fold / "spool")
        (plan.out / "parent_run.json").unlink(missing_ok=True)
    write_json(plan.out / "submission.json", {"work": plan.work, "uri": store(plan.out, plan.site), "submission": plan.submission})


def _create(plan: Plan, snapshot: Snapshot, uri: str, same: bool, missing: list[str]) -> None:
    from jmt_dist.track import tracker  # brings MLflow: 1.5 s

    parent = tracker.ParentRun.load(plan.out) if same else None
    if parent is None:
        tags = {
            **describe_code(snapshot.commit, bool(snapshot.dirty), snapshot.sha256),
            "mlflow.user": getpass.getuser(),
            "mlflow.source.name": "launch/submit_folds.py",
            "folder": str(plan.out),
            "site": plan.site.name,
            "submission": plan.submission,
        }
        artifacts = None if plan.site.tracking_uri else plan.out.parent / "mlartifacts"
        params = plan.recipe.model_dump(mode="json")
        parent = tracker.create_experiment(uri, plan.recipe.name, tags, params, artifacts)
    for fold in missing:
        spool = plan.out / fold / "spool"
        if (spool / "run.json").is_file():
            _keep_aside(spool)
        tags = {"submission": plan.submission, "mlflow.user": getpass.getuser()}
        run = tracker.create_child(parent, fold, tags, of=plan.recipe.name)
        tracker.save_run(spool, uri if sends(plan.site) else "", run)
    parent.save(plan.out)  # last: without it the next submission starts anew


def _keep_aside(spool: Path) -> None:
    number = next(index for index in range(1, 10_000) if not spool.with_name(f"spool-{index}").exists())
    spool.rename(spool.with_name(f"spool-{number}"))
