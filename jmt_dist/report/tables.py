"""Tables of one experiment and of several, and the forms they are written in: text, CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jmt_dist.track.compare import CROSS_VALIDATION, PAPER_TABLE1, TARGETS, FoldResult, RunResult, Score, folds_mean, paper_mean


def table1_csv(run: RunResult) -> str:
    """The six rows as CSV: fold,valence,arousal,average; `nan` where a fold has no score."""
    rows = [[row.fold, *(f"{v:.6f}" for v in _values(row.score))] for row in run.folds]
    return csv_text([["fold", *TARGETS], *rows])


@dataclass(frozen=True)
class Table:
    """A table as text, for the terminal, Markdown and HTML alike; `bold` holds (row, column) of the best cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]] = frozenset()
    note: str = ""


def table1(run: RunResult) -> Table:
    """Table 1: CCC and 95 % interval of each fold, the paper's numbers beside, and the mean over folds 1 to 5."""
    rows: list[tuple[str, ...]] = []
    for row in run.folds:
        own = [with_interval(row.score, i) for i in range(3)] if row.score else [row.reason, "", ""]
        rows.append((row.fold, *own, *(f"{value:.3f}" for value in PAPER_TABLE1[row.fold])))
    mean = folds_mean(run)
    count = sum(row.fold in CROSS_VALIDATION and row.score is not None for row in run.folds)
    own = [f"{m:.3f} ± {s:.3f}" for m, s in zip(*mean, strict=True)] if mean else ["–"] * 3
    paper = [f"{m:.3f} ± {s:.3f}" for m, s in zip(*paper_mean(), strict=True)]
    rows.append((f"mean of {count} fold{'' if count == 1 else 's'}", *own, *paper))
    bold = _best_cells([_values(row.score) for row in run.folds], 1) | _best_cells([PAPER_TABLE1[row.fold] for row in run.folds], 4)
    return Table(
        f"Table 1: CCC of {run.model or 'the fusion model'} on each fold ({run.name})",
        ("fold", "valence", "arousal", "average", "paper: valence", "paper: arousal", "paper: average"),
        tuple(rows),
        bold,
        "Brackets: 95 % interval by bootstrap over videos. Bold: the highest of its column. "
        "The last row is the mean and standard deviation of folds 1 to 5.",
    )


def systems_table(row: FoldResult, ceilings: Mapping[str, Score] | None = None) -> Table | None:
    """The fusion model beside its baselines on one fold, and the fixture's ceilings; None where there is nothing to compare."""
    if row.score is None or not (row.baselines or ceilings):
        return None
    ranked = sorted(row.baselines.items(), key=lambda item: -item[1].average)
    systems = [(row.model, row.score), *ranked]
    cells = [(f"{name} ({_seeds(score)})", *(with_interval(score, i) for i in range(3)), _spread(score)) for name, score in systems]
    bold = _best_cells([score.values() for _, score in systems], 1)
    for name, score in (ceilings or {}).items():
        cells.append((f"ceiling: {name}", *(f"{value:.3f}" for value in score.values()), ""))
    note = "A ceiling is the CCC of the best possible estimate from that modality's noisy cues, on the same units." if ceilings else ""
    return Table(f"Systems on fold {row.fold}", ("system", *TARGETS, "± over seeds"), tuple(cells), bold, note)


def runs_table(runs: Sequence[RunResult]) -> Table:
    """Several experiments: official fold with its interval, mean of folds 1 to 5, and what their recipes change."""
    changed = changed_keys(runs)
    rows, official, means = [], [], []
    for run in runs:
        score, mean = run.folds[0].score, folds_mean(run)
        official.append(_values(score))
        means.append((mean[0][2] if mean else math.nan,))
        own = [with_interval(score, i) for i in range(3)] if score else [run.folds[0].reason, "", ""]
        done = len(run.folds) - len(run.missing)
        across = f"{mean[0][2]:.3f} ± {mean[1][2]:.3f}" if mean else "–"
        rows.append(
            (run.name, *own, across, f"{done} of {len(run.folds)}", *costs_text(costs(run)), *(run.recipe.get(key, "") for key in changed))
        )
    bold = _best_cells(official, 1) | _best_cells(means, 4)
    columns = ("run", *(f"official: {t}" for t in TARGETS), "folds 1-5: average", "folds done", *COSTS, *changed)
    return Table("Runs compared", columns, tuple(rows), bold, "CCC; brackets: 95 % interval by bootstrap over videos.")


COSTS = ("parameters", "ms per 1,000 clips")


def costs(run: RunResult) -> tuple[int | None, float | None]:
    """Parameters of a run's fusion model and its ms per 1,000 clips, from the first fold that has them, on that fold's machine."""
    known: Mapping[str, Any] = next((row.costs for row in run.folds if row.costs), {})
    count, time = known.get("parameters"), known.get("ms_per_1000_clips")
    return count if isinstance(count, int) else None, float(time) if isinstance(time, int | float) else None


def costs_text(known: tuple[int | None, float | None]) -> tuple[str, str]:
    """`costs` as the cells of the columns `COSTS`."""
    count, time = known
    return "–" if count is None else f"{count:,}", "–" if time is None else f"{time:.0f}"


def changed_keys(runs: Sequence[RunResult], limit: int = 6) -> list[str]:
    """Recipe keys whose values differ between runs, at most `limit`; `name` is the row's title already."""
    keys = sorted({key for run in runs for key in run.recipe} - {"name"})
    return [key for key in keys if len({run.recipe.get(key) for run in runs}) > 1][:limit]


def runs_csv(runs: Sequence[RunResult]) -> str:
    """One row per run and fold: run, fold, scores, interval bounds of the average; `nan` where there is no score."""
    rows = [["run", "fold", *TARGETS, "average_low", "average_high"]]
    for run in runs:
        for row in run.folds:
            low, high = (row.score.interval or {}).get("average", (math.nan, math.nan)) if row.score else (math.nan, math.nan)
            rows.append([run.name, row.fold, *(f"{v:.6f}" for v in (*_values(row.score), low, high))])
    return csv_text(rows)


def markdown(table: Table) -> str:
    """A table in Markdown, best cells bold."""
    lines = [f"### {table.title}", "", f"| {' | '.join(table.columns)} |", f"|{'---|' * len(table.columns)}"]
    for i, row in enumerate(table.rows):
        cells = [f"**{cell}**" if (i, j) in table.bold else cell for j, cell in enumerate(row)]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, *(["", table.note] if table.note else []), ""])


def latex(table: Table, label: str) -> str:
    """A table in LaTeX for the booktabs package, best cells bold; `label` is what \\ref takes."""
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_tex(table.title)}. {_tex(table.note)}}}",
        rf"  \label{{{label}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"    \toprule",
        f"    {' & '.join(map(_tex, table.columns))} " + r"\\",
        r"    \midrule",
    ]
    for i, row in enumerate(table.rows):
        cells = [rf"\textbf{{{_tex(cell)}}}" if (i, j) in table.bold else _tex(cell) for j, cell in enumerate(row)]
        lines.append(f"    {' & '.join(cells)} " + r"\\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--", "−": "$-$", "Δ": r"$\Delta$", "→": r"$\to$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def with_interval(score: Score, index: int) -> str:
    """A score's valence (0), arousal (1) or average (2), and its 95 % interval where it has one."""
    text = f"{score.values()[index]:.3f}"
    if score.interval is None:
        return text
    low, high = score.interval[TARGETS[index]]
    return f"{text} [{low:.3f}, {high:.3f}]"


def _seeds(score: Score) -> str:
    return "1 seed" if score.seeds == 1 else f"mean of {score.seeds} seeds"


def _spread(score: Score) -> str:
    return " / ".join(f"{score.spread[target]:.3f}" for target in TARGETS) if score.spread else ""


def _values(score: Score | None) -> tuple[float, ...]:
    return score.values() if score else (math.nan,) * 3


def _best_cells(rows: Sequence[Sequence[float]], first: int) -> frozenset[tuple[int, int]]:
    """(row, column) of the highest number of each column, columns counted from `first`; none where there is one number only."""
    cells: set[tuple[int, int]] = set()
    for c, column in enumerate(zip(*rows, strict=True)):
        known = [i for i, value in enumerate(column) if math.isfinite(value)]
        if len(known) > 1:
            cells.add((max(known, key=column.__getitem__), first + c))
    return frozenset(cells)


def csv_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows as CSV, lines ending in a line feed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
