"""The last step of a submission: what is left in the spools goes to the store, then the tables and the report are written."""

from __future__ import annotations

import sys
from pathlib import Path

from jmt_dist.errors import UserError


def compare(out: Path) -> None:
    """Write Table 1 and the report of a run folder, and say what is missing in them; a store that fails does not keep them away."""
    from jmt_dist.cluster.tracking import close_lost
    from jmt_dist.track.report import compare_run, show
    from jmt_dist.track.sync import left, sync

    try:
        lost = close_lost(out)
    except UserError as error:
        lost = []
        print(f"tracking: {error}", file=sys.stderr)
    if left(out) or lost:
        try:
            for fold in sync(out):
                if fold.problem:
                    print(f"tracking: {fold.fold}: {fold.problem}", file=sys.stderr)
        except UserError as error:
            print(f"tracking: {error}", file=sys.stderr)
    show(compare_run(out))
