"""How the folds of a run folder are shown: one line per fold, as a live table on a terminal or as plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from jmt_dist.cluster.status import Row

COLUMNS = ("fold", "state", "stage", "epoch", "step", "score", "starts", "job", "node", "heartbeat")
_COLOURS = {"done": "green", "failed": "red", "lost": "red", "running": "cyan", "stopped": "yellow"}


def plain(row: Row) -> str:
    """A fold as one line of a log."""
    words = [f"{row.fold:<9}", row.state]
    if row.stage and row.state in ("running", "stopped", "failed", "lost"):
        words.append(row.stage)
    words += [f"{name} {value}" for name, value in (("epoch", row.epoch), ("step", row.step), ("score", row.score)) if value]
    if row.starts not in ("", "1"):
        words.append(f"start {row.starts}")
    return "  ".join(words) + (f"  ({row.reason})" if row.reason else "")


def table(rows: Sequence[Row], title: str = "", columns: Sequence[str] = COLUMNS) -> Any:
    """The folds as a rich table; reasons of failures below it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title or None, title_justify="left", pad_edge=False)
    for name in columns:
        grid.add_column(name, overflow="fold", no_wrap=True)
    for row in rows:
        cells = [Text(getattr(row, name), style=_COLOURS.get(row.state, "") if name == "state" else "") for name in columns]
        grid.add_row(*cells)
    return Group(grid, *(Text(f"{row.fold}: {row.reason}") for row in rows if row.reason))


class Progress:
    """Shows rows while jobs run: refreshed in place on a terminal, changed lines every `every` seconds in a log."""

    def __init__(self, title: str, rows: Callable[[], list[Row]], every: float = 10.0, columns: Sequence[str] = COLUMNS) -> None:
        from rich.console import Console

        self._columns = columns
        self._title, self._rows, self._every = title, rows, every
        self._console = Console()
        self._live: Any = None
        self._last: dict[str, str] = {}
        self._printed = 0.0

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            from rich.live import Live

            # no thread of its own: children ask Linux for a signal when the thread that started them ends
            self._live = Live(self._render(), console=self._console, auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.show(force=True)
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def say(self, line: str) -> None:
        """One line above the table, or in the log."""
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def show(self, force: bool = False) -> None:
        """Show what has changed, not more often than a reader needs."""
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            return
        if not force and time.monotonic() - self._printed < self._every:
            return
        self._printed = time.monotonic()
        for row in self._rows():
            line = plain(row)
            if row.state != "waiting" and self._last.get(row.fold) != line:
                self._last[row.fold] = line
                print(line, flush=True)

    def _render(self) -> Any:
        return table(self._rows(), self._title, self._columns)
