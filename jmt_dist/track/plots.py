"""The figures of the report, as SVG: folds beside the paper's, learning curves, predictions over time."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jmt_dist.track import names
from jmt_dist.track.compare import FOLDS, PAPER_TABLE1, TARGETS, RunResult, Score
from jmt_dist.track.spool import read_metrics

VALENCE, AROUSAL, AVERAGE, GREY = "#0072B2", "#D55E00", "#555555", "#9a9a9a"  # Okabe and Ito: told apart by all eyes
COLOURS = (VALENCE, AROUSAL, AVERAGE)
FOLD_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
PAPER_MARK: dict[str, Any] = {"marker": "D", "markersize": 5, "color": "white", "markeredgecolor": "black", "linestyle": ""}
MOST_POINTS = 800  # of a drawn line


@dataclass(frozen=True)
class Trace:
    """Predictions and labels [rows, 2] of one unit (mean over seeds; NaN = no label)."""

    unit: str
    fold: str
    va: NDArray[np.float64]
    labels: NDArray[np.float64]


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure of `width` × `height` inches without global state, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
    return fig, axes


def render(fig: Any, kind: str = "svg") -> bytes:
    """The figure as SVG or PNG; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "jmt-dist"}):
        fig.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def fold_bars(run: RunResult) -> Any:
    """One group of bars per fold with the 95 % interval, and the paper's number as a mark on each; a missing fold stays empty."""
    fig, axes = figure(9, 3.4)
    axis = axes[0, 0]
    for c, (target, colour) in enumerate(zip(TARGETS, COLOURS, strict=True)):
        for x, row in enumerate(run.folds):
            place = x + (c - 1) * 0.26
            axis.plot(place, PAPER_TABLE1[row.fold][c], zorder=4, **PAPER_MARK)
            if row.score is not None:
                axis.bar(place, row.score.values()[c], 0.24, color=colour)
                _interval(axis, place, row.score, target)
            elif c == 1:
                axis.text(x, 0.02, row.reason[:40], rotation=90, ha="center", va="bottom", fontsize=8, color=GREY)
    axis.set_xticks(range(len(FOLDS)), FOLDS)
    axis.set_ylabel("CCC")
    low = min([0.0, *(row.score.values()[c] for row in run.folds if row.score for c in range(3))])
    axis.set_ylim(low * 1.1, 1)
    axis.axhline(0, color="black", linewidth=0.8)
    _legend(axis, [*zip(TARGETS, COLOURS, strict=True)], paper=True)
    return fig


def system_bars(systems: Mapping[str, Score], ceilings: Mapping[str, Score] | None) -> Any:
    """One group of bars per system with intervals; the ceilings in groups of their own, hatched."""
    groups = [(name, score, False) for name, score in systems.items()]
    groups += [(f"ceiling:\n{name}", score, True) for name, score in (ceilings or {}).items()]
    fig, axes = figure(max(5.0, 1.15 * len(groups) + 1), 3.2)
    axis = axes[0, 0]
    for x, (_, score, ceiling) in enumerate(groups):
        for c, (target, colour) in enumerate(zip(TARGETS, COLOURS, strict=True)):
            place = x + (c - 1) * 0.26
            style: dict[str, Any] = {"facecolor": "white", "edgecolor": colour, "hatch": "////"} if ceiling else {"color": colour}
            axis.bar(place, score.values()[c], 0.24, **style)
            _interval(axis, place, score, target)
    axis.set_xticks(range(len(groups)), [name for name, *_ in groups])
    axis.set_ylabel("CCC")
    axis.set_ylim(min(0.0, *(v for _, s, _ in groups for v in s.values())) * 1.1, 1)
    axis.axhline(0, color="black", linewidth=0.8)
    _legend(axis, [*zip(TARGETS, COLOURS, strict=True)], paper=False)
    return fig


def learning_curves(run: RunResult) -> Any | None:
    """Validation score and training loss of each stage over its steps, a colour per fold; None where no spool has a curve."""
    curves = {row.fold: read_metrics(run.out / row.fold / "spool") for row in run.folds}
    known = ("visual", "audio", f"fusion/{run.model}")
    stages = [stage for stage in known if any(_series(one, stage, names.LOSS) for one in curves.values())]
    if not stages:
        return None
    fig, axes = figure(3.2 * len(stages) + 1, 4.8, 2, len(stages))
    for column, stage in enumerate(stages):
        for fold, colour in zip(FOLDS, FOLD_COLOURS, strict=True):
            for row, name in enumerate((names.SCORE, names.LOSS)):
                for index, points in enumerate(_series(curves[fold], stage, name)):
                    steps, values = _thin(points)
                    style = {"marker": "o", "markersize": 2.5} if name == names.SCORE else {}
                    label = fold if index == 0 else None
                    axes[row, column].plot(steps, values, color=colour, linewidth=1, alpha=0.85, label=label, **style)
        axes[0, column].set_title(stage, fontsize=10)
        axes[0, column].sharex(axes[1, column])
        axes[1, column].set_xlabel("optimiser step")
    axes[0, 0].set_ylabel("validation score (CCC)")
    axes[1, 0].set_ylabel("training loss")
    handles, labels = _handles(axes.flat)
    fig.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return fig


def prediction_traces(traces: Sequence[Trace]) -> Any:
    """Prediction and label over the frames of some units: valence left, arousal right."""
    fig, axes = figure(10, 1.9 * len(traces) + 0.4, len(traces), 2)
    for row, trace in enumerate(traces):
        keep = np.unique(np.linspace(0, len(trace.va) - 1, min(len(trace.va), MOST_POINTS)).astype(int))
        for c, colour in enumerate((VALENCE, AROUSAL)):
            axis = axes[row, c]
            axis.plot(keep + 1, trace.va[keep, c], color=colour, linewidth=0.9, label="prediction")
            axis.plot(keep + 1, trace.labels[keep, c], color="black", linewidth=1.4, label="label")
            axis.set_ylim(-1.05, 1.05)
            axis.set_title(f"{trace.unit} ({trace.fold}): {TARGETS[c]}", fontsize=9)
            axis.legend(loc="upper right", fontsize=7, frameon=False, ncols=2)
    for axis in axes[-1]:
        axis.set_xlabel("frame")
    return fig


def read_traces(run: RunResult, count: int = 3) -> list[Trace]:
    """Units of the first fold that has predictions, spread evenly over their names; the mean over the seeds of the fusion model."""
    import pyarrow.parquet as pq

    for row in run.folds:
        files = run.predictions(row.fold, row.model or run.model)
        if row.score is None or not files:
            continue
        names = sorted(set(pq.read_table(files[0], columns=["unit"])["unit"].to_pylist()))
        chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).astype(int))]
        traces = [_trace(files, unit, row.fold) for unit in chosen]
        return [trace for trace in traces if np.isfinite(trace.labels).any()]
    return []


def _trace(files: Sequence[Path], unit: str, fold: str) -> Trace:
    import pyarrow.parquet as pq

    columns = ["valence", "arousal", "valence_label", "arousal_label"]
    tables = [pq.read_table(file, columns=columns, filters=[("unit", "=", unit)]) for file in files]
    numbers = np.stack([[table[name].to_numpy() for name in columns] for table in tables]).mean(axis=0, dtype=np.float64).T
    return Trace(unit, fold, numbers[:, :2], numbers[:, 2:])


def _series(curves: Mapping[str, list[tuple[int, float]]], stage: str, name: str) -> list[list[tuple[int, float]]]:
    """The curves of a stage: one for visual and audio, one per seed for a fusion model."""
    wanted = re.compile(rf"{re.escape(stage)}(-seed\d+)?/{name}")
    return [points for key, points in sorted(curves.items()) if wanted.fullmatch(key)]


def _thin(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = [*points[:-1:every], points[-1]]
    return [step for step, _ in kept], [value for _, value in kept]


def _interval(axis: Any, place: float, score: Score, target: str) -> None:
    if score.interval is not None:
        low, high = score.interval[target]
        axis.plot([place, place], [low, high], color="black", linewidth=1, zorder=3)


def _legend(axis: Any, entries: Sequence[tuple[str, str]], paper: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in entries]
    if paper:
        handles.append(Line2D([], [], label="paper", **PAPER_MARK))
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


def _handles(axes: Any) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    order = [fold for fold in FOLDS if fold in found]
    return [found[name] for name in order], order
