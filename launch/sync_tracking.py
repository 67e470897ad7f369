"""Send to MLflow what the folds of a run folder still have in their spools; sending again adds nothing.

    python launch/sync_tracking.py out=runs/demo                   after a server was away, or where jobs only spool (SLURM)
    python launch/sync_tracking.py out=runs/demo watch=true        every few seconds, until no fold goes on, or Ctrl-C
    python launch/sync_tracking.py out=runs/demo uri=http://tracking.internal:5000

Ends with what was sent and what is left; exit code 3 where something is left.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from jmt_dist.config import Options
from jmt_dist.errors import UserError
from jmt_dist.program import OK, OMISSIONS, run
from jmt_dist.recipe import build, word_layer

if TYPE_CHECKING:
    from jmt_dist.track.sync import FoldSync


class SyncOptions(Options):
    """What to send, and where to."""

    out: str = Field(description="run folder, as submit_folds.py printed it")
    uri: str = Field("", description="MLflow tracking URI; empty: the one the run was submitted with, else sqlite beside the run folder")
    watch: bool = Field(False, description="go on sending until every fold is done, failed or stopped")
    every: Annotated[float, Field(gt=0)] = Field(5.0, description="seconds between two rounds of watch=true")


def main(words: list[str]) -> int:
    """Replay the spools, once or until no fold goes on."""
    options = build(SyncOptions, [word_layer(word) for word in words])
    from jmt_dist.cluster.tracking import close_lost
    from jmt_dist.track.sync import finished, sync

    out = Path(options.out)
    print(f"sending the spools of {out}", flush=True)
    while True:
        with contextlib.suppress(UserError):  # a machine without SLURM's commands sends all the same
            close_lost(out)
        folds = sync(out, options.uri)
        left = _print(folds, quiet=options.watch)
        if not options.watch or (not left and finished(out)):
            break
        time.sleep(options.every)
    print(f"{out}: {'everything is stored' if not left else f'{left} records are left'}")
    return OMISSIONS if left or any(fold.problem for fold in folds) else OK


def _print(folds: list[FoldSync], quiet: bool) -> int:
    """One line per fold (when quiet: only where something happened); returns the records left."""
    for fold in folds:
        report = fold.report
        if quiet and not (report.sent or fold.problem):
            continue
        parts = [f"{report.sent} sent", f"{report.left} left"]
        parts += [f"{report.unreadable} unreadable lines"] if report.unreadable else []
        parts += [f"{len(report.missing)} files gone"] if report.missing else []
        parts += ["being sent by another process"] if report.busy else []
        print(f"{fold.fold}: {', '.join(parts)}{f'; {fold.problem}' if fold.problem else ''}", flush=True)
        for name in report.refused[:5]:
            print(f"  refused by the store: {name}", flush=True)
    return sum(fold.report.left for fold in folds)


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", SyncOptions)])
