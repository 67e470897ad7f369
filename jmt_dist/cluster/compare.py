"""The last step of a submission: what is left in the spools goes to the store, then the tables and the report are written."""

from __future__ import annotations

import sys
from pathlib import Path

from jmt_dist.errors import UserError


def compare(out: Path) -> None:
    """Write Table 1 and the report of a run folder, and say what is missing in them; a store that fails does not keep them away."""
    from rich.console import Console
    from rich.table import Table as Grid

    from jmt_dist.track.report import compare_run
    from jmt_dist.track.sync import left, sync

    if left(out):
        try:
            for fold in sync(out):
                if fold.problem:
                    print(f"tracking: {fold.fold}: {fold.problem}", file=sys.stderr)
        except UserError as error:
            print(f"tracking: {error}", file=sys.stderr)
    result = compare_run(out)
    console = Console() if sys.stdout.isatty() else Console(width=140)  # a log has no width of its own
    for table in result.tables:
        grid = Grid(title=table.title, title_justify="left")
        for name in table.columns:
            grid.add_column(name)
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
    for line in result.omissions:
        print(f"left out: {line}")
    for path in result.files:
        print(path)
