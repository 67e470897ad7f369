"""Writes what `compare` found: CSV, Markdown, and one HTML file that needs nothing but itself; and logs them to MLflow."""

from __future__ import annotations

import base64
import html
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from jmt_dist.track import plots
from jmt_dist.track.compare import (
    RunResult,
    Score,
    Table,
    markdown,
    ranked,
    read_ceilings,
    read_run,
    runs_csv,
    runs_table,
    systems_table,
    table1,
    table1_csv,
)
from jmt_dist.track.publish import publish_comparison, publish_run
from jmt_dist.track.tracker import ParentRun

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b1b1b;background:#fff;max-width:1160px;margin:2.5em auto;padding:0 1.5em}
h1{font-size:1.6em;margin-bottom:.1em}h2{font-size:1.15em;margin-top:2.2em}.sub{color:#5f5f5f;margin-top:0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93em}
th,td{padding:.35em .8em;text-align:left;border-bottom:1px solid #e3e3e3}th{border-bottom:2px solid #1b1b1b}
td{white-space:nowrap}td.reason{color:#a33a00;white-space:normal}.note{color:#5f5f5f;font-size:.88em;max-width:62em}
.omissions{border-left:4px solid #d55e00;background:#fdf3ec;padding:.6em 1em}
figure{margin:1.2em 0}img{max-width:100%}details{margin-top:2em}pre{font-size:.85em;overflow-x:auto;background:#f6f6f6;padding:1em}
.wide{overflow-x:auto}
"""


@dataclass
class Comparison:
    """What was written, what to print, and what is missing."""

    tables: list[Table] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    omissions: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)  # how to see more


def compare_run(out: Path, fixture: Path | None = None) -> Comparison:
    """Table 1 of one run folder: writes table1.csv, table1.md and report.html there, and logs them to its MLflow parent run.

    Folds without a score, figures that cannot be drawn and a store that does not answer are `omissions`, not errors.
    Raises UserError where `out` is no run folder or `fixture` no fixture.json.
    """
    run = read_run(out)
    ceilings = read_ceilings(fixture) if fixture is not None else None
    result = Comparison([table1(run)], omissions=[f"{row.fold}: {row.reason}" for row in run.missing])
    for row in run.folds:
        table = systems_table(row, ceilings if row.fold == "official" else None)
        if table is not None:
            result.tables.append(table)
    figures = _run_figures(run, ceilings, result.omissions)
    heading = f"{run.name}: {run.model or 'fusion model'} on {'the folds' if fixture is None else 'the folds of a fixture'}"
    page = _page(heading, f"run folder {out.resolve()}", result, figures, run.recipe)
    texts = {"table1.csv": table1_csv(run), "table1.md": "\n".join(markdown(table) for table in result.tables), "report.html": page}
    result.files += [_write(out / name, text) for name, text in texts.items()]
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
    return [f"learning curves: {mlflow if mlflow.is_file() else 'mlflow'} ui --backend-store-uri {parent.uri}"]


def compare_runs(folders: Sequence[Path], out: Path) -> Comparison:
    """Several run folders side by side: writes comparison.csv, comparison.md and report.html into `out`."""
    runs = [read_run(folder) for folder in folders]
    result = Comparison([runs_table(runs)])
    result.omissions += [f"{run.name}, {row.fold}: {row.reason}" for run in runs for row in run.missing]
    systems: dict[str, Score] = {run.name: run.folds[0].score for run in runs if run.folds[0].score is not None}
    drawn: list[tuple[str, bytes]] = []
    if systems:
        _draw(drawn, result.omissions, "Official fold: CCC with 95 % intervals", lambda: plots.system_bars(systems, None))
    page = _page("Runs compared", ", ".join(run.name for run in runs), result, drawn, {})
    texts = {"comparison.csv": runs_csv(runs), "comparison.md": markdown(result.tables[0]), "report.html": page}
    out.mkdir(parents=True, exist_ok=True)
    result.files += [_write(out / name, text) for name, text in texts.items()]
    problem = publish_comparison(runs, out, result.files)
    if problem:
        result.omissions.append(problem)
    return result


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
    for path in result.files:
        print(path)
    for line in result.hints:
        print(line)


def run_folders(folder: Path) -> list[Path]:
    """The run folders inside a sweep's folder, the best first."""
    return [run.out for run in ranked([read_run(path.parent) for path in sorted(folder.glob("*/recipe.yaml"))])]


def _run_figures(run: RunResult, ceilings: Mapping[str, Score] | None, omissions: list[str]) -> list[tuple[str, bytes]]:
    drawn: list[tuple[str, bytes]] = []
    _draw(drawn, omissions, "Folds beside the paper's numbers; lines: 95 % interval", lambda: plots.fold_bars(run))
    for row in run.folds:
        if row.score is not None and (row.baselines or (ceilings and row.fold == "official")):
            systems = {row.model: row.score, **dict(sorted(row.baselines.items(), key=lambda item: -item[1].average))}
            draw = partial(plots.system_bars, systems, ceilings if row.fold == "official" else None)
            _draw(drawn, omissions, f"Systems on fold {row.fold}", draw)
    caption = "Learning curves. The training loss is that of small batches: it is not comparable with the validation score"
    _draw(drawn, omissions, caption, lambda: plots.learning_curves(run))

    def traces() -> Any:
        found = plots.read_traces(run)
        return plots.prediction_traces(found) if found else None

    _draw(drawn, omissions, "Predictions (mean over seeds) and labels of some validation units", traces)
    return drawn


def _draw(drawn: list[tuple[str, bytes]], omissions: list[str], caption: str, make: Callable[[], Any | None]) -> None:
    """Add a figure; what keeps it from being drawn is an omission, since the tables matter more."""
    try:
        figure = make()
        if figure is not None:
            drawn.append((caption, plots.render(figure)))
    except Exception as error:
        omissions.append(f"figure `{caption}`: {type(error).__name__}: {error}")


def _page(title: str, subtitle: str, result: Comparison, figures: Sequence[tuple[str, bytes]], recipe: Mapping[str, str]) -> str:
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="sub">{html.escape(subtitle)} · {made}</p>']
    if result.omissions:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in result.omissions)
        parts.append(f'<div class="omissions"><strong>Missing here</strong><ul>{items}</ul></div>')
    parts += [_html_table(table) for table in result.tables]
    for caption, svg in figures:
        picture = base64.b64encode(svg).decode()
        alt = html.escape(caption, quote=True)
        parts.append(f'<h2>{alt}</h2><figure><img alt="{alt}" src="data:image/svg+xml;base64,{picture}"></figure>')
    if recipe:
        lines = html.escape("\n".join(f"{key} = {value}" for key, value in recipe.items()))
        parts.append(f"<details><summary>Recipe</summary><pre>{lines}</pre></details>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    body = []
    for i, row in enumerate(table.rows):
        missing = len(row) > 2 and row[1] and row[2] == "" and row[3] == ""
        cells = []
        for j, cell in enumerate(row):
            text = html.escape(cell)
            text = f"<strong>{text}</strong>" if (i, j) in table.bold else text
            cells.append(f'<td class="reason">{text}</td>' if missing and j == 1 else f"<td>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return f'<h2>{html.escape(table.title)}</h2><div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>{note}'


def _write(path: Path, text: str) -> Path:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
    return path
