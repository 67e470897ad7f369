"""Runs the ranks of one local job: submitit's controller, with siblings ended when one rank dies and a clock that keeps time.

Started by `local.py` as `python -m jmt_dist.cluster.controller <folder>` in a session of its own, so that the whole group can be
ended at once. It leaves `<folder>/exits.json`: exit codes by rank, and whether the time limit was reached.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from submitit.local.local import Controller, LocalJobEnvironment

from jmt_dist.cluster.plan import check_owner
from jmt_dist.cluster.status import write_json

GRACE_SECONDS = 5.0  # for siblings of a dead rank to report their own errors before they are ended


class RankController(Controller):
    """submitit's local controller (it starts the ranks, forwards SIGTERM, ends what is left) for ranks that depend on each other."""

    def wait(self, freq: int = 24) -> list[int | None]:
        """Exit codes once all ranks have ended, one of them has failed and the grace time is over, or the time limit is reached."""
        start = time.monotonic()
        failed_at: float | None = None
        warned = timeout = False
        while True:
            codes = [task.poll() for task in self.tasks]
            gone = time.monotonic() - start
            if all(code is not None for code in codes):
                break
            if failed_at is None and any(code not in (None, 0) for code in codes):
                failed_at = gone
            if failed_at is not None and gone - failed_at > GRACE_SECONDS:
                break
            if not warned and gone >= self.timeout_s - self.signal_delay_s:
                warned = True
                self._forward_signal(LocalJobEnvironment._usr_sig())
            if gone >= self.timeout_s:
                timeout = True
                break
            time.sleep(1.0 / freq)
        write_json(self.folder / "exits.json", {"codes": codes, "timeout": timeout})
        return codes

    def run(self, max_retry: int = 1) -> None:
        """Start the ranks once and wait; starting again is the scheduler's business."""
        try:
            self.start_tasks()
            self.wait()
        finally:
            self.kill_tasks()


if __name__ == "__main__":
    os.umask(0o077)
    check_owner(Path(sys.argv[1]))
    RankController(Path(sys.argv[1])).run()
