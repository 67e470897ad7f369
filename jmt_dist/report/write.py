"""Writes what a comparison found: tables as CSV, Markdown and LaTeX, and one HTML file; and stores them in MLflow."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jmt_dist.report.content import Gathered, Wishes, of_run, of_runs
from jmt_dist.report.page import page
from jmt_dist.report.tables import Table, latex, markdown, runs_csv, table1_csv
from jmt_dist.report.units import units_csv
from jmt_dist.track.compare import RunResult, read_ceilings, read_run
from jmt_dist.track.publish import publish_comparison, publish_run
from jmt_dist.track.tracker import ParentRun


@dataclass
class Comparison:
    """What was written, what to print, and what is missing."""

    tables: list[Table] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    omissions: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)  # how to see more


def compare_run(out: Path, fixture: Path | None = None, wishes: Wishes | None = None) -> Comparison:
    """Table 1 of one run folder: writes table1.csv, .md and .tex, units.csv, smoothing.json and report.html there, and logs them.

    Folds without a score, figures that cannot be drawn and a store that does not answer are `omissions`, not errors.
    Raises UserError where `out` is no run folder, `fixture` no fixture.json, or a wish cannot be met.
    """
    run = read_run(out)
    found = of_run(run, read_ceilings(fixture) if fixture is not None else None, wishes or Wishes())
    texts = {"table1.csv": table1_csv(run), **_texts("table1", found)}
    if found.units:
        texts["units.csv"] = units_csv(found.units)
    if found.smoothing:
        texts["smoothing.json"] = json.dumps(found.smoothing, indent=1) + "\n"
    result = _written(out, texts, found)
    problem = publish_run(run, result.files)
    if problem:
        result.omissions.append(problem)
    result.hints += _ways_to_see(out)
    return result


def _ways_to_see(out: Path) -> list[str]:
    parent = ParentRun.load(out)
    if parent is None:
        return []
    if not parent.uri.startswith("sqlite:"):
        return [f"learning curves: {parent.uri}"]
    mlflow = Path(sys.executable).with_name("mlflow")
    program = shlex.quote(str(mlflow)) if mlflow.is_file() else "mlflow"
    return [f"learning curves: {program} ui --backend-store-uri {shlex.quote(parent.uri)}"]


def compare_runs(runs: Sequence[RunResult], out: Path, reference: str = "") -> Comparison:
    """Several runs side by side: writes comparison.csv, .md and .tex, ranking.csv and report.html into `out`.

    `reference`: what the ranking compares every run with (`pairs.reference_of`). Raises UserError where no run is called so.
    """
    found = of_runs(runs, reference=reference)
    out.mkdir(parents=True, exist_ok=True)
    texts = {"comparison.csv": runs_csv(runs)}
    if found.ranking:
        texts["ranking.csv"] = found.ranking
    else:
        (out / "ranking.csv").unlink(missing_ok=True)  # of an earlier comparison, of other runs
    result = _written(out, {**texts, **_texts("comparison", found)}, found)
    problem = publish_comparison(runs, out, result.files)
    if problem:
        result.omissions.append(problem)
    return result


def _texts(name: str, found: Gathered) -> dict[str, str]:
    labels = [f"tab:{name}" + (f"-{i}" if i else "") for i in range(len(found.tables))]
    return {
        f"{name}.md": "\n".join(markdown(table) for table in found.tables),
        f"{name}.tex": "\n".join(latex(table, label) for table, label in zip(found.tables, labels, strict=True)),
    }


def _written(out: Path, texts: dict[str, str], found: Gathered) -> Comparison:
    files = [_write(out / name, text) for name, text in {**texts, "report.html": page(found.content)}.items()]
    return Comparison(found.tables, files, list(found.content.omissions))


def show(result: Comparison) -> None:
    """Print the tables, what is missing, and the paths of what was written."""
    import rich.table
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a log: rich would fold every row into 80 columns
        console = Console(width=160)
    for table in result.tables:
        grid = rich.table.Table(title=table.title, title_justify="left", caption=table.note or None, caption_justify="left")
        for name in table.columns:
            grid.add_column(name, overflow="fold")
        for i, row in enumerate(table.rows):
            grid.add_row(*(Text(cell, style="bold" if (i, j) in table.bold else "") for j, cell in enumerate(row)))
        console.print(grid)
    for line in result.omissions:
        print(f"missing: {line}")
    for line in result.hints:
        print(line)
    for path in result.files:  # the report's comes last
        print(path)


def _write(path: Path, text: str) -> Path:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)  # a full disk leaves half of it
    return path
