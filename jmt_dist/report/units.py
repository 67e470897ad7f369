"""Every validation unit by itself: how well it is predicted, and what its material is like (faces missing, frame rate)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jmt_dist.affwild2.media import FALLBACK_FPS
from jmt_dist.data.report import read_report
from jmt_dist.errors import UserError
from jmt_dist.evaluate.ensemble import combine
from jmt_dist.evaluate.metric import Scores, unit_scores
from jmt_dist.evaluate.predict import UnitPrediction, read_predictions
from jmt_dist.evaluate.stored import unit_video
from jmt_dist.report.tables import Table
from jmt_dist.track.compare import RunResult

COLUMNS = (
    "fold", "unit", "video", "rows", "labelled", "ccc_valence", "ccc_arousal", "rmse_valence", "rmse_arousal",
    "pearson_valence", "pearson_arousal", "sign_valence", "sign_arousal", "faces_missing", "fps",
)  # fmt: skip


@dataclass(frozen=True)
class Material:
    """What packing noted of a unit: share of its frames without a face, and frames per second."""

    faces_missing: float
    fps: float


@dataclass(frozen=True)
class UnitResult:
    """One validation unit of a fold; `scores` of the mean over seeds, None with fewer than two labels; `material` None: unknown."""

    fold: str
    unit: str
    rows: int
    scores: Scores | None
    material: Material | None = None

    @property
    def rmse(self) -> float:
        """Root mean square of both targets' errors; NaN without labels. Unlike a CCC it is steady on units whose labels hardly vary."""
        return ((self.scores.rmse_valence**2 + self.scores.rmse_arousal**2) / 2) ** 0.5 if self.scores else float("nan")


def fold_predictions(run: RunResult, fold: str, model: str = "") -> dict[str, UnitPrediction]:
    """The validation units of a fold as the mean over its seeds says; {} where the fold has no predictions."""
    row = next(row for row in run.folds if row.fold == fold)
    name = model or row.model or run.model
    files = run.predictions(fold, name) if row.score is not None and name else []
    return combine([read_predictions(file) for file in files]) if files else {}


def unit_results(fold: str, predictions: Mapping[str, UnitPrediction], material: Mapping[str, Material]) -> list[UnitResult]:
    """All units of a fold, best first (by `rmse`), those without labels last."""
    scored = unit_scores({name: one.va for name, one in predictions.items()}, {name: one.labels for name, one in predictions.items()})
    found = [UnitResult(fold, name, len(one.va), scored[name], material.get(name)) for name, one in predictions.items()]
    return sorted(found, key=lambda unit: (unit.scores is None, unit.rmse, unit.unit))


def read_material(shards: Path) -> dict[str, Material]:
    """What the packing report of a shard folder says of its units; {} where there is none to read."""
    from jmt_dist.data.shards import read_manifest

    try:
        units = {unit.name: unit.rows for unit in read_manifest(shards).units}
    except UserError:
        return {}
    report = read_report(shards)
    if report is None:
        return {}
    missing, fps = dict.fromkeys(units, 0), dict.fromkeys(units, FALLBACK_FPS)
    for note in report.all_notes():
        if note.unit not in units:
            continue
        number = re.match(r"[\d.]+", note.detail)
        if note.what == "frames without a crop" and number:
            missing[note.unit] += int(number[0])
        elif note.what == "unreadable crops":
            missing[note.unit] += note.detail.count(",") + 1
        elif note.what == "frame rate other than 30" and number:
            fps[note.unit] = float(number[0])
    return {name: Material(missing[name] / rows if rows else 0.0, fps[name]) for name, rows in units.items()}


def units_csv(units: list[UnitResult]) -> str:
    """One row per unit; a cell without a number is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for unit in units:
        s, m = unit.scores, unit.material
        numbers = (
            (s.valence, s.arousal, s.rmse_valence, s.rmse_arousal, s.pearson_valence, s.pearson_arousal, s.sign_valence, s.sign_arousal)
            if s
            else [None] * 8
        )
        known = (m.faces_missing, m.fps) if m else (None, None)
        cells = ["" if value is None else f"{value:.6g}" for value in (*numbers, *known)]
        writer.writerow([unit.fold, unit.unit, unit_video(unit.unit), unit.rows, s.frames if s else 0, *cells])
    return text.getvalue()


def extremes_table(units: list[UnitResult], count: int = 5) -> Table | None:
    """The best and the worst units of a fold; None where fewer than two have labels."""
    scored = [unit for unit in units if unit.scores is not None]
    if len(scored) < 2:
        return None
    count = min(count, len(scored) // 2)
    rows = []
    for place, unit in [*enumerate(scored[:count], 1), *enumerate(scored[-count:], len(scored) - count + 1)]:
        s, m = unit.scores, unit.material
        assert s is not None
        known = (f"{100 * m.faces_missing:.1f} %", f"{m.fps:g}") if m else ("", "")
        numbers = (f"{unit.rmse:.3f}", f"{s.valence:.3f}", f"{s.arousal:.3f}", f"{(s.sign_valence + s.sign_arousal) / 2:.2f}")
        rows.append((f"{place} of {len(scored)}", unit.unit, f"{s.frames:,}", *numbers, *known))
    columns = ("by error", "unit", "labelled frames", "RMSE", "CCC valence", "CCC arousal", "equal signs", "faces missing", "fps")
    note = "RMSE over both targets. A unit's own CCC is low by nature where its labels hardly vary. All units are in units.csv."
    return Table(f"Best and worst units of fold {units[0].fold}", columns, tuple(rows), note=note)
