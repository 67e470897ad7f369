"""The callable that submitit pickles: one fold on one rank, the same on this machine and under SLURM (DESIGN section 11).

submitit's own SIGUSR2 handler acts on rank 0 only, inside the signal, and its SIGTERM handler does nothing. So the handlers
here only set a flag; the training loop's ranks agree on it, save, and raise Stopped; then rank 0 calls the kept handler.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from jmt_dist.cluster import attempts, plan, rendezvous, share, status
from jmt_dist.cluster.lease import Lease
from jmt_dist.config import Recipe, Site
from jmt_dist.errors import UserError

WARNED = "time limit or preemption (SIGUSR2)"
_WARNING = signal.SIGUSR2  # submitit's signal: the time limit is near, or the job is about to be preempted
_PR_SET_PDEATHSIG = 1


class FoldJob:
    """Runs one fold in one rank; holds only plain values, so that its pickle loads with any later version of our classes."""

    def __init__(self, work: plan.Plan, fold: str) -> None:
        self.out, self.fold, self.work, self.submission = str(work.out), fold, work.work, work.submission
        self.recipe, self.site = work.recipe.model_dump(mode="json"), work.site.model_dump(mode="json")
        self.snapshot, self.function = str(work.snapshot), work.function
        self.share, self.needs = [str(folder) for folder in work.share], [str(folder) for folder in work.needs]

    def __call__(self) -> dict[str, str]:
        """Run the fold; return {"outcome": "done" | "stopped", "reason": …}. Any other exception has been recorded and goes on."""
        from jmt_dist.train import stop

        out, environment = Path(self.out), export_ranks()
        if environment.cluster == "local":
            die_with_parent()
        start = attempts.Start(self.submission, environment.job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
        signals: list[int] = []
        kept = _listen(signals, stop.request)
        first = environment.global_rank == 0
        try:
            self._check_code()
            with self._alone(out, start, environment) if first else self._with_first(out, start):
                plan.resolve(self.function)(Recipe.model_validate(self.recipe), Site.model_validate(self.site), self.fold, out)
        except stop.Stopped:
            reason = stop.requested() or "asked to stop"
            if first:
                attempts.close_attempt(out, self.fold, start, "stopped", reason)
                status.update_status(out, self.fold, state="stopped", reason=reason)
                if environment.cluster == "slurm" and _WARNING in signals:
                    self._requeue(out, kept[_WARNING])
                if environment.cluster == "slurm":  # preempted or cancelled: the batch script's last lines ask SLURM which of them
                    raise RuntimeError(f"stopped after saving: {reason}") from None
            return {"outcome": "stopped", "reason": reason}
        except Exception as error:
            attempts.report_error(out, self.fold, environment.global_rank, error)
            raise
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
        if first:
            attempts.close_attempt(out, self.fold, start, "done")
            status.update_status(out, self.fold, state="done", work=self.work, reason="")
        return {"outcome": "done", "reason": ""}

    @contextlib.contextmanager
    def _alone(self, out: Path, start: attempts.Start, environment: Any) -> Iterator[None]:
        """Rank 0: the fold's folder is this job's alone, and holds the stages that others have done. Then the other ranks may come."""

        def note(**changes: Any) -> None:
            status.update_status(out, self.fold, start=status.now(), job=start.job, node=node(), **{"try": number}, **changes)

        host = rendezvous.address(environment.hostnames[0], environment.num_nodes > 1)
        number = attempts.open_attempt(out, self.fold, start)
        owner = f"job {start.job}, start {start.restart + 1}"
        with Lease(out / self.fold, owner, lambda who: note(state="waiting", reason=f"{who} is still at work here"), raise_stop):
            note(state="running", reason="")
            share.require_done([Path(folder) for folder in self.needs], self.fold)
            share.link_stages([Path(folder) for folder in (*self.needs, *self.share)], out, self.fold)
            rendezvous.publish(out / self.fold, str(start), host)
            yield

    @contextlib.contextmanager
    def _with_first(self, out: Path, start: attempts.Start) -> Iterator[None]:
        rendezvous.await_port(out / self.fold, str(start), raise_stop)
        yield

    def checkpoint(self) -> Any:
        """What submitit submits again: this same job, which goes on from the fold's checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _check_code(self) -> None:
        home = Path(plan.__file__).resolve()
        if self.snapshot and Path(self.snapshot).resolve() not in home.parents:
            raise UserError(f"the job runs {home.parent.parent}, not the code of its submission in {self.snapshot}", "Submit again.")

    def _requeue(self, out: Path, handler: Any) -> None:
        """Put this SLURM job back into the queue through submitit's handler, which ends this process; or say why not."""
        tries = int(self.site["tries"])
        started = attempts.count(out, self.fold, self.submission)
        reason = f"stopped by SLURM at start {started} of {tries}"
        if started < tries:
            status.update_status(out, self.fold, state="waiting")
            try:
                handler(_WARNING, None)
            except Exception as error:
                reason = f"could not be queued again: {error}"
        status.update_status(out, self.fold, state="failed", reason=reason)
        raise RuntimeError(reason)


class CompareJob:
    """Compares the folds of a run folder once they have ended: the dependent job of a SLURM array."""

    def __init__(self, out: Path, compare: str) -> None:
        self.out, self.compare = str(out), compare

    def __call__(self) -> str:
        """Write the tables of the run folder and return its path."""
        plan.resolve(self.compare)(Path(self.out))
        return self.out

    def checkpoint(self) -> Any:
        """The same comparison again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def node() -> str:
    """The node this process runs on, as SLURM calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def export_ranks() -> Any:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and, where needed, gloo's interface for torch, and return submitit's environment.

    CUDA_VISIBLE_DEVICES is left alone: DeepSpeed selects device LOCAL_RANK itself.
    """
    from submitit.core.job_environment import JobEnvironment

    environment = JobEnvironment()
    ranks = {"RANK": environment.global_rank, "WORLD_SIZE": environment.num_tasks, "LOCAL_RANK": environment.local_rank}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    rendezvous.choose_interface(environment.hostnames)
    return environment


def raise_stop() -> None:
    """Raise Stopped where a stop was requested; for waits."""
    from jmt_dist.train import stop

    if stop.requested():
        raise stop.Stopped(stop.requested())


def _listen(signals: list[int], request: Callable[[str], None]) -> dict[signal.Signals, Any]:
    """Install handlers that only note the signal and ask for a stop; return the handlers that were there."""

    def ask(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        request({_WARNING: WARNED}.get(signal.Signals(number), "asked to end (SIGTERM)"))

    return {number: signal.signal(number, ask) for number in (_WARNING, signal.SIGTERM)}


def die_with_parent() -> None:
    """Have Linux send this process SIGTERM when its parent dies: a killed scheduler leaves no orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
