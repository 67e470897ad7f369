"""The figures of the report, as data for plotly.js: what `page` draws in the browser (every figure answers to the mouse)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jmt_dist.evaluate.predict import UnitPrediction
from jmt_dist.report.units import UnitResult
from jmt_dist.track import names
from jmt_dist.track.compare import FOLDS, PAPER_TABLE1, TARGETS, RunResult, Score
from jmt_dist.track.spool import read_metrics

Figure = dict[str, Any]  # {"data": [...], "layout": {...}}
VALENCE, AROUSAL, AVERAGE, GREY = "#0072B2", "#D55E00", "#555555", "#9a9a9a"  # Okabe and Ito: told apart by all eyes
COLOURS = (VALENCE, AROUSAL, AVERAGE)
FOLD_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MOST_POINTS = 1000  # of a drawn curve
BINS = 50  # of a density, over [-1, 1]
COUNTS = {  # one scale for both halves of a figure: frames, logarithmic
    "colorscale": "Viridis",
    "cmin": 0,
    "colorbar": {"title": {"text": "frames"}, "tickvals": [0, 1, 2, 3, 4, 5], "ticktext": ["1", "10", "100", "1,000", "10⁴", "10⁵"]},
}
WORDS = {
    "angry": (-0.6, 0.7),
    "afraid": (-0.25, 0.87),
    "happy": (0.8, 0.3),
    "excited": (0.6, 0.72),
    "calm": (0.7, -0.6),
    "sad": (-0.75, -0.4),
}


def layout(height: int, **more: Any) -> dict[str, Any]:
    """What all figures share."""
    axis = {"gridcolor": "#e6e6e6", "zerolinecolor": "#b0b0b0", "linecolor": "#1b1b1b"}
    margin = {"l": 60, "r": 20, "t": 30, "b": 50}
    base = {
        "height": height,
        "margin": margin,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "font": {"family": "system-ui, sans-serif"},
    }
    merged = {**base, "legend": {"orientation": "h", "y": 1.12, "x": 0}, **more}
    for name in {"xaxis", "yaxis", *(key for key in more if re.fullmatch(r"[xy]axis\d*", key))}:
        merged[name] = {**axis, **more.get(name, {})}
    return merged


def numbers(values: Any, digits: int = 4) -> list[float | None]:
    """Numbers for JSON: rounded, None where there is none."""
    return [round(float(value), digits) if math.isfinite(value) else None for value in values]


def fold_bars(run: RunResult) -> Figure:
    """CCC of each fold with its 95 % interval, and the paper's as a mark; a missing fold stays empty."""
    data = [_bars(target, FOLDS, [row.score for row in run.folds], c) for c, target in enumerate(TARGETS)]
    for c, target in enumerate(TARGETS):
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "paper",
                "legendgroup": "paper",
                "showlegend": c == 0,
                "x": list(FOLDS),
                "y": [PAPER_TABLE1[fold][c] for fold in FOLDS],
                "marker": {"symbol": "diamond", "size": 8, "color": "white", "line": {"color": "black", "width": 1.5}},
                "offsetgroup": target,
                "hovertemplate": "%{x}, paper: %{y:.3f}<extra></extra>",
            }
        )
    return {"data": data, "layout": layout(380, barmode="group", scattermode="group", yaxis={"title": {"text": "CCC"}})}


def system_bars(systems: Mapping[str, Score], ceilings: Mapping[str, Score] | None) -> Figure:
    """One group of bars per system with its interval; the ceilings hatched."""
    names = [*systems, *(f"ceiling: {name}" for name in ceilings or {})]
    scores = [*systems.values(), *(ceilings or {}).values()]
    data = [_bars(target, names, scores, c) for c, target in enumerate(TARGETS)]
    for bars in data:
        bars["marker"]["pattern"] = {"shape": [""] * len(systems) + ["/"] * len(ceilings or {})}
    return {"data": data, "layout": layout(360, barmode="group", yaxis={"title": {"text": "CCC"}})}


def _bars(target: str, names: Sequence[str], scores: Sequence[Score | None], index: int) -> Figure:
    values = [score.values()[index] if score else math.nan for score in scores]
    ends = [score.interval[target] if score and score.interval else (math.nan, math.nan) for score in scores]
    text = [f"[{low:.3f}, {high:.3f}]" if math.isfinite(low) else "" for low, high in ends]
    error = {
        "type": "data",
        "visible": any(text),
        "symmetric": False,
        "thickness": 1,
        "width": 3,
        "color": "#1b1b1b",
        "array": numbers(high - value for value, (_, high) in zip(values, ends, strict=True)),
        "arrayminus": numbers(value - low for value, (low, _) in zip(values, ends, strict=True)),
    }
    return {
        "type": "bar",
        "name": target,
        "x": list(names),
        "y": numbers(values),
        "error_y": error,
        "customdata": text,
        "marker": {"color": COLOURS[index]},
        "offsetgroup": target,
        "hovertemplate": f"%{{x}}, {target}: %{{y:.3f}} %{{customdata}}<extra></extra>",
    }


def learning_curves(run: RunResult) -> Figure | None:
    """Training loss and validation score of every stage over its steps, one colour per fold; None where nothing was recorded."""
    curves = {row.fold: read_metrics(run.out / row.fold / "spool") for row in run.folds if (run.out / row.fold / "spool").is_dir()}
    stages = [
        name for name in ("visual", "audio", f"fusion/{run.model}") if any(series(found, name, names.LOSS) for found in curves.values())
    ]
    if not stages:
        return None
    data: list[Figure] = []
    places: dict[str, Any] = {}
    width = 1 / len(stages)
    for column, stage in enumerate(stages):
        domain = [column * width + 0.05 * (column > 0), (column + 1) * width - 0.02]
        for row, (name, title) in enumerate(((names.SCORE, "validation score (CCC)"), (names.LOSS, "training loss"))):
            n = _number(2 * column + row + 1)
            below, beside = {"text": f"{stage}: step" if row else ""}, {"text": "" if column else title}
            places[f"xaxis{n}"] = {"domain": domain, "anchor": f"y{n}", "title": below}
            if row:  # zooms with the one above it
                places[f"xaxis{n}"]["matches"] = f"x{_number(2 * column + 1)}"
            places[f"yaxis{n}"] = {"domain": [0, 0.44] if row else [0.54, 1], "anchor": f"x{n}", "title": beside}
            for fold, found in curves.items():
                for seed, points in enumerate(series(found, stage, name)):
                    steps, values = thin(points)
                    data.append(
                        {
                            "type": "scatter",
                            "mode": "lines" if row else "lines+markers",
                            "x": steps,
                            "y": numbers(values),
                            "name": fold,
                            "xaxis": f"x{n}",
                            "yaxis": f"y{n}",
                            "legendgroup": fold,
                            "showlegend": not n and seed == 0,
                            "line": {"color": FOLD_COLOURS[FOLDS.index(fold)], "width": 1.2},
                            "marker": {"size": 4},
                        }
                    )
    return {"data": data, "layout": layout(560, **places)}


def _number(n: int) -> str:
    """How the n-th axis is numbered: plotly leaves the first bare."""
    return "" if n == 1 else str(n)


def series(curves: Mapping[str, list[tuple[int, float]]], stage: str, name: str) -> list[list[tuple[int, float]]]:
    """The curves of a stage: one for visual and audio, one per seed for a fusion model."""
    wanted = re.compile(rf"{re.escape(stage)}(-seed\d+)?/{name}")
    return [points for key, points in sorted(curves.items()) if wanted.fullmatch(key)]


def thin(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps and values of a curve, every n-th so that about `MOST_POINTS` are left; the last stays."""
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = [*points[:-1:every], points[-1]]
    return [step for step, _ in kept], [value for _, value in kept]


def density(predictions: Mapping[str, UnitPrediction]) -> Figure | None:
    """How often which prediction meets which label, for both targets; None without labels."""
    va, labels = labelled(predictions)
    if not len(va):
        return None
    data = [_heat(labels[:, c], va[:, c], c + 1) for c in range(2)]
    data += [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [-1, 1],
            "y": [-1, 1],
            "xaxis": f"x{_number(c)}",
            "yaxis": f"y{_number(c)}",
            "showlegend": False,
            "line": {"color": "black", "width": 1, "dash": "dot"},
            "hoverinfo": "skip",
        }
        for c in (1, 2)
    ]
    axes = _squares("label", "prediction", ("valence", "arousal"))
    return {"data": data, "layout": layout(440, coloraxis=COUNTS, **axes)}


def circumplex(predictions: Mapping[str, UnitPrediction]) -> Figure | None:
    """Where labels and where predictions lie in the plane of valence and arousal; None without labels."""
    va, labels = labelled(predictions)
    if not len(va):
        return None
    data = [_heat(labels[:, 0], labels[:, 1], 1), _heat(va[:, 0], va[:, 1], 2)]
    angle = np.linspace(0, 2 * np.pi, 73)
    for c in (1, 2):
        quiet = {"type": "scatter", "xaxis": f"x{_number(c)}", "yaxis": f"y{_number(c)}", "showlegend": False, "hoverinfo": "skip"}
        data.append(
            {**quiet, "mode": "lines", "x": numbers(np.cos(angle)), "y": numbers(np.sin(angle)), "line": {"color": "#777777", "width": 1}}
        )
        x, y = zip(*WORDS.values(), strict=True)
        data.append({**quiet, "mode": "text", "x": x, "y": y, "text": list(WORDS), "textfont": {"color": "#555555", "size": 11}})
    return {"data": data, "layout": layout(440, coloraxis=COUNTS, **_squares("valence", "arousal", ("labels", "predictions")))}


def labelled(predictions: Mapping[str, UnitPrediction]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Predictions and labels [N, 2] of all labelled frames."""
    empty = np.zeros((0, 2), np.float32)
    va = np.concatenate([empty, *(one.va for one in predictions.values())])
    labels = np.concatenate([empty, *(one.labels for one in predictions.values())])
    known = np.isfinite(labels).all(axis=1)
    return va[known], labels[known]


def _heat(x: NDArray[np.float32], y: NDArray[np.float32], place: int) -> Figure:
    edges = np.linspace(-1, 1, BINS + 1)
    counts = np.histogram2d(np.clip(y, -1, 1), np.clip(x, -1, 1), [edges, edges])[0]
    middles = numbers((edges[1:] + edges[:-1]) / 2, 3)
    shown = [[round(math.log10(count), 3) if count else None for count in row] for row in counts]
    return {
        "type": "heatmap",
        "x": middles,
        "y": middles,
        "z": shown,
        "text": counts.astype(int).tolist(),
        "xaxis": f"x{_number(place)}",
        "yaxis": f"y{_number(place)}",
        "coloraxis": "coloraxis",
        "hovertemplate": "%{x:.2f}, %{y:.2f}: %{text} frames<extra></extra>",
    }


def _squares(x: str, y: str, titles: tuple[str, str]) -> dict[str, Any]:
    axes: dict[str, Any] = {}
    for c, title in enumerate(titles, start=1):
        domain = [0, 0.46] if c == 1 else [0.54, 1]
        name = _number(c)
        axes[f"xaxis{name}"] = {
            "range": [-1.05, 1.05],
            "domain": domain,
            "constrain": "domain",
            "anchor": f"y{_number(c)}",
            "title": {"text": f"{x} ({title})"},
        }
        axes[f"yaxis{name}"] = {
            "range": [-1.05, 1.05],
            "constrain": "domain",
            "anchor": f"x{_number(c)}",
            "title": {"text": y},
            "scaleanchor": f"x{_number(c)}",
        }
    return axes


def unit_errors(units: Sequence[UnitResult]) -> Figure | None:
    """Error of every unit: all in their order, and against the share of missing faces and the frame rate where those are known."""
    scored = [unit for unit in units if unit.scores is not None]
    if not scored:
        return None
    known = [unit for unit in scored if unit.material is not None]
    views: list[tuple[str, list[float], list[UnitResult]]] = [("unit, best first", [float(n + 1) for n in range(len(scored))], scored)]
    if known:
        views.append(("frames without a face (%)", [100 * unit.material.faces_missing for unit in known if unit.material], known))
        views.append(("frames per second", [unit.material.fps for unit in known if unit.material], known))
    data: list[Figure] = []
    axes: dict[str, Any] = {}
    width, longest = 1 / len(views), max(unit.rows for unit in scored)
    for n, (title, x, shown) in enumerate(views, start=1):
        name = _number(n)
        axes[f"xaxis{name}"] = {
            "domain": [(n - 1) * width + 0.05 * (n > 1), n * width - 0.02],
            "anchor": f"y{name}",
            "title": {"text": title},
        }
        axes[f"yaxis{name}"] = {
            "anchor": f"x{name}",
            "rangemode": "tozero",
            "title": {"text": "RMSE" if n == 1 else ""},
            **({"matches": "y"} if n > 1 else {}),
        }
        sizes = numbers((5 + 9 * math.sqrt(unit.rows / longest) for unit in shown), 1)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": numbers(x),
                "y": numbers(unit.rmse for unit in shown),
                "xaxis": f"x{name}",
                "yaxis": f"y{name}",
                "text": [unit.unit for unit in shown],
                "customdata": [unit.scores.frames for unit in shown if unit.scores],
                "showlegend": False,
                "marker": {"color": VALENCE, "opacity": 0.7, "size": sizes},
                "hovertemplate": f"%{{text}}: RMSE %{{y:.3f}}, {title} %{{x:.4g}}, %{{customdata}} labelled frames<extra></extra>",
            }
        )
    return {"data": data, "layout": layout(360, **axes)}


def gains(names: Sequence[str], values: Sequence[float], ends: Sequence[tuple[float, float]]) -> Figure:
    """What smoothing adds to the average of each fold, with its 95 % interval."""
    score = [Score(value, value, value, {"average": end}) for value, end in zip(values, ends, strict=True)]
    bars = _bars("average", names, score, 2)
    return {"data": [bars], "layout": layout(280, yaxis={"title": {"text": "gain in CCC"}})}
