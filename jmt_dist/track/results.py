"""What a finished fold stores beside its metrics: scores, predictions, results of stages, and two figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jmt_dist.track import names
from jmt_dist.track.spool import Spool, read_metrics

COLOURS = ("#0072B2", "#D55E00")  # valence, arousal; Okabe and Ito: told apart by all eyes


def record_results(spool: Spool, folder: Path) -> None:
    """Record the files of the fold in `folder` as artifacts of its run, after drawing its figures into `<folder>/figures`.

    Predictions are numbers per frame, no pictures: the dataset's licence lets them be kept. A figure that cannot be drawn
    is said on stderr and left out. Does nothing for ranks other than 0.
    """
    if spool.folder is None:
        return
    spool.artifact(folder / "metrics.json")
    if (folder / "costs.json").is_file():
        spool.artifact(folder / "costs.json")
    for path in sorted([*folder.glob("*/done.json"), *folder.glob("fusion/*/done.json"), *folder.glob("evaluate/*/*.parquet")]):
        if "." not in str(path.parent.relative_to(folder)):  # stages of other settings, moved aside
            spool.artifact(path, str(path.parent.relative_to(folder)))
    for name, draw in (("learning-curves.png", _curves), ("predictions.png", _predictions)):
        target = folder / "figures" / name
        try:
            figure = draw(folder)
            if figure is not None:
                target.parent.mkdir(exist_ok=True)
                figure.savefig(target, dpi=110)
                spool.artifact(target, "figures")
        except Exception as error:  # the fold is done; a picture of it must not undo that
            print(f"tracking: {target} could not be drawn: {type(error).__name__}: {error}", file=sys.stderr)


def _axes(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no global state, safe in a job

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _curves(folder: Path) -> Any | None:
    """Validation CCC and training loss of every stage over its optimiser steps; seeds and baselines of the fusion together."""
    curves = read_metrics(folder / "spool")
    stages = sorted({name.removesuffix(f"/{names.LOSS}") for name in curves if name.endswith(f"/{names.LOSS}")})
    groups = [group for group in ("visual", "audio", "fusion") if any(stage.split("/")[0] == group for stage in stages)]
    if not groups:
        return None
    figure, axes = _axes(2, len(groups), 3.6, 2.6)
    for column, group in enumerate(groups):
        for stage in (one for one in stages if one.split("/")[0] == group):
            for row, metric in enumerate((names.SCORE, names.LOSS)):
                points = curves.get(f"{stage}/{metric}", [])
                axes[row, column].plot([s for s, _ in points], [v for _, v in points], ".-", lw=1, ms=4, label=stage.split("/")[-1])
        axes[0, column].set_title(group)
        axes[0, column].sharex(axes[1, column])
        axes[1, column].set_xlabel("optimiser step")
        if group == "fusion":
            axes[0, column].legend(fontsize=7)
    axes[0, 0].set_ylabel("validation CCC, mean")
    axes[1, 0].set_ylabel("training loss")
    return figure


def _predictions(folder: Path) -> Any | None:
    """Density of prediction against label, over all labelled frames of the fold's validation units (its first system)."""
    import numpy as np
    import pyarrow.parquet as pq

    model = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["model"]
    files = sorted(folder.glob(f"evaluate/{model}-seed*/predictions.parquet"))
    if not files:
        return None
    table = pq.read_table(files[0])
    figure, axes = _axes(1, 2, 3.8, 3.8)
    for axis, target, colour in zip(axes[0], names.TARGETS, COLOURS, strict=False):
        label, found = table[f"{target}_label"].to_numpy(), table[target].to_numpy()
        known = np.isfinite(label)
        counts, edges_x, edges_y = np.histogram2d(label[known], found[known], bins=40, range=[[-1, 1], [-1, 1]])
        axis.pcolormesh(edges_x, edges_y, np.log1p(counts.T), cmap="Greys")
        axis.plot([-1, 1], [-1, 1], color=colour, lw=1)
        axis.set(title=target, xlabel="label", ylabel="prediction", aspect="equal")
    figure.suptitle(f"{files[0].parent.name}: frames, logarithmic", fontsize=9)
    return figure
