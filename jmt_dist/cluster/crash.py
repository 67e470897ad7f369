"""The last lines of a SLURM fold job whose ranks failed: close the start, and queue the job again while tries are left.

Called by the batch script as `python -m jmt_dist.cluster.crash <list of tasks> <exit code>`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from jmt_dist.cluster import attempts, slurm
from jmt_dist.cluster.job import WARNED
from jmt_dist.cluster.status import read_json, update_status
from jmt_dist.errors import UserError


def main(words: list[str]) -> int:
    """Settle this job's start; 0 where nothing is left to do or the job was queued again."""
    tasks, code = read_json(Path(words[0])), int(words[1])
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    out, fold = Path(tasks["tasks"][int(task or "0")][0]), tasks["tasks"][int(task or "0")][1]
    job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task is not None else os.environ["SLURM_JOB_ID"]
    start = attempts.Start(tasks["submission"], job, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    entries = [entry for entry in attempts.read_attempts(out, fold) if entry.get("submission") == start.submission]
    if any(entry.get("job") == job and int(entry.get("restart") or 0) > start.restart for entry in entries):
        return 0  # SLURM took this node for lost and has started the job elsewhere: what failed here is of the past
    mine = next((entry for entry in entries if start.matches(entry)), {})
    if mine.get("outcome") == "stopped" and mine.get("reason") == WARNED:
        return 0  # rank 0 has dealt with it: queued again, or failed with its reason
    trouble, goes_on = "", False
    try:
        goes_on = _is_running(job)
    except UserError as error:
        trouble = error.sentence
    if mine.get("outcome") == "stopped" and not goes_on and not trouble:
        return 0  # cancelled, or SLURM has put it back itself
    verdict = attempts.settle(out, fold, start, int(tasks["tries"]), _reason(code))
    print(f"{fold}: {verdict.reason or verdict.next}", flush=True)
    if verdict.next != "again":
        return 0
    if trouble:
        update_status(out, fold, state="failed", reason=f"{verdict.reason}; could not be queued again: {trouble}")
        return 1
    if not goes_on:
        update_status(out, fold, state="stopped", reason=verdict.reason)
        return 0
    update_status(out, fold, state="waiting", reason=verdict.reason)
    answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    if answer.returncode:
        update_status(out, fold, state="failed", reason=f"{verdict.reason}; could not be queued again: {answer.stderr.strip()}")
    return answer.returncode


def _is_running(job: str) -> bool:
    """Whether SLURM means this job to go on: one that was cancelled is completing, and requeue would bring it back.

    A job in the grace time of its preemption is still running: SLURM starts it again only if it outlives that time.
    """
    found = slurm.squeue(job).get(job)
    return found is not None and found.state == "RUNNING"


def _reason(code: int) -> str:
    return f"the ranks were killed by signal {code - 128}" if code > 128 else f"the ranks exited with {code} and left no reason"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
