"""The foreground scheduler of `site.executor=local`: at most `site.parallel` fold jobs, each a submitit local job.

submitit's local executor knows no limit, no order and stops jobs after two minutes by default; here a job has the site's time
limit, is started again after a crash or a stop (it goes on from its checkpoints), and ends with this program.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from submitit.helpers import clean_env
from submitit.local.local import LocalExecutor, LocalJob

from jmt_dist.cluster import attempts, site, status
from jmt_dist.cluster.job import FoldJob, die_with_parent
from jmt_dist.cluster.plan import Plan
from jmt_dist.cluster.progress import Progress
from jmt_dist.config import Site

COLUMNS = ("fold", "state", "stage", "epoch", "step", "score", "starts", "heartbeat")
POLL_SECONDS = 0.25
STOP_SECONDS = 120.0  # a step and a save, before the group is killed


class GroupExecutor(LocalExecutor):
    """submitit's local executor, whose controller leads a session of its own and can be ended with all it has started."""

    def __init__(self, folder: Path, options: Site, environment: dict[str, str]) -> None:
        super().__init__(folder)
        self.options, self.environment = options, environment
        self.process: subprocess.Popen[bytes] | None = None

    def _submit_command(self, command: str) -> LocalJob[Any]:
        options = self.options
        environment = {
            **self.environment,
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_NTASKS": str(options.ranks_per_node),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_TIMEOUT_S": str(site.seconds(options.time)),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(options.signal_seconds),
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
        }
        words = [site.python(), "-m", "jmt_dist.cluster.controller", str(self.folder)]
        if options.environment:  # `exec` keeps the process id, which names the job
            exports = [f"export {name}={shlex.quote(environment[name])}" for name in ("PYTHONPATH", "PYTHONSAFEPATH", "OMP_NUM_THREADS")]
            words = ["bash", "-ec", "\n".join([*options.environment, *exports, f"exec {shlex.join(words)}"])]
        with (self.folder / "controller.log").open("ab") as log:
            self.process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return LocalJob(self.folder, str(self.process.pid), list(range(options.ranks_per_node)), self.process)


@dataclass
class Running:
    """A fold job that has been started."""

    fold: str
    slot: int
    start: attempts.Start
    folder: Path
    process: subprocess.Popen[bytes]
    created: float
    deadline: float


class Scheduler:
    """Runs the folds of a plan on this machine; `run` returns the state of each."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.waiting = list(plan.todo)
        self.running: list[Running] = []
        self.ended: dict[str, dict[str, Any]] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.stopping = 0
        self.gpus = site.gpu_slots(plan.site)

    def run(self) -> dict[str, str]:
        """Run every fold to its end. Raises KeyboardInterrupt, with no process left, when asked to stop."""
        for fold in self.plan.todo:
            status.update_status(self.plan.out, fold, state="waiting", reason="")
        with _signals(self), Progress(f"{self.plan.recipe.name}: {self.plan.out}", self._rows, columns=COLUMNS) as progress:
            try:
                while (self.waiting or self.running) and not self.stopping:
                    while self.waiting and len(self.running) < self.plan.site.parallel:
                        self._start(self.waiting.pop(0), progress)
                    self._collect(progress)
                    progress.show()
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop_all(progress)
        if self.stopping:
            raise KeyboardInterrupt
        return {fold: str(status.read_status(self.plan.out, fold).get("state", "")) for fold in self.plan.todo}

    def _start(self, fold: str, progress: Progress) -> None:
        plan, options = self.plan, self.plan.site
        slot = next(index for index in range(options.parallel) if index not in {job.slot for job in self.running})
        number = 1 + attempts.count(plan.out, fold, plan.submission)
        folder = plan.jobs / f"{fold}-{number}"
        folder.mkdir(parents=True)
        with clean_env():
            environment = {**os.environ, **site.job_environment(options, plan.snapshot)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(plan.snapshot), os.environ.get("PYTHONPATH")]))
        if self.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot]
        executor = GroupExecutor(folder, options, environment)
        job = executor.submit(FoldJob(plan, fold))
        process = executor.process
        assert process is not None
        limit = site.seconds(options.time) + 60  # the controller keeps the limit itself; this is for a controller that hangs
        created = psutil.Process(process.pid).create_time()
        start = attempts.Start(plan.submission, job.job_id)
        self.running.append(Running(fold, slot, start, folder, process, created, time.monotonic() + limit))
        log = str(folder / f"{job.job_id}_0_log.out")
        self.entries[fold] = {"fold": fold, "job": job.job_id, "pid": process.pid, "created": created, "log": log, "folder": str(folder)}
        self._write_jobs()
        progress.say(f"{fold}: start {number} of at most {options.tries}, {options.ranks_per_node} rank(s), log {log}")

    def _collect(self, progress: Progress) -> None:
        for job in list(self.running):
            late = time.monotonic() > job.deadline
            if not ended(job.process) and not late:
                continue
            kill_group(job.process.pid)
            job.process.wait()
            self.running.remove(job)
            verdict = self._settle(job, late)
            if verdict.next == "again":
                self.waiting.insert(0, job.fold)
                status.update_status(self.plan.out, job.fold, state="waiting", reason=verdict.reason)
            if verdict.next != "done":
                progress.say(f"{job.fold}: {verdict.reason}" + ("; starting it again" if verdict.next == "again" else ""))

    def _settle(self, job: Running, late: bool) -> attempts.Verdict:
        exits = status.read_json(job.folder / "exits.json")
        timeout = late or bool(exits.get("timeout"))
        reason = f"time limit site.time={self.plan.site.time} reached" if timeout else _exit_reason(exits, job)
        outcome = "timeout" if timeout else "crashed"
        return attempts.settle(self.plan.out, job.fold, job.start, self.plan.site.tries, reason, outcome)

    def _stop_all(self, progress: Progress) -> None:
        """Ask every job to save and end, then end what is left; a second signal does not wait."""
        if self.running:
            progress.say(f"stopping {len(self.running)} job(s): they save and end within {STOP_SECONDS:.0f} s; once more to end them now")
        for job in self.running:
            _send(job.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while not all(ended(job.process) for job in self.running) and time.monotonic() < deadline and self.stopping < 2:
            progress.show()
            time.sleep(POLL_SECONDS)
        for job in self.running:
            kill_group(job.process.pid)
            job.process.wait()
            if status.read_status(self.plan.out, job.fold).get("state") == "running":
                attempts.close_attempt(self.plan.out, job.fold, job.start, "stopped", "ended by submit_folds.py before it could save")
                reason = "ended before it could save; the last checkpoint counts"
                status.update_status(self.plan.out, job.fold, state="stopped", reason=reason)
        self.running.clear()

    def _rows(self) -> list[status.Row]:
        jobs = {"jobs": list(self.entries.values())}
        return [status.row(self.plan.out, fold, jobs) for fold in self.plan.folds]

    def _write_jobs(self) -> None:
        entries = [self.entries[fold] for fold in self.plan.todo if fold in self.entries]
        me = {"pid": os.getpid(), "created": psutil.Process().create_time(), "host": socket.gethostname()}
        status.write_json(self.plan.out / "jobs.json", {"executor": "local", **self.plan.describe(), "scheduler": me, "jobs": entries})


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a child has ended, without reaping it: until then its id, which names its group, belongs to nobody else."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def kill_group(leader: int) -> None:
    """SIGKILL to a job's whole session; nothing where it is gone."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _exit_reason(exits: dict[str, Any], job: Running) -> str:
    dead = [(rank, code) for rank, code in enumerate(exits.get("codes", [])) if code not in (None, 0)]
    words = [f"rank {rank} {f'was killed by {signal.Signals(-code).name}' if code < 0 else f'exited with {code}'}" for rank, code in dead]
    return "; ".join(words) or f"its controller ended with {job.process.returncode}, see {job.folder / 'controller.log'}"


@contextmanager
def _signals(scheduler: Scheduler) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP ask the scheduler to stop instead of ending this program in the middle."""

    def ask(number: int, frame: object) -> None:
        scheduler.stopping += 1

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: the terminal may go, the folds go on
        numbers.append(signal.SIGHUP)
    kept = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
