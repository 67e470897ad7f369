"""Valence and arousal of chosen units over time beside their annotation, and pictures of the faces for the cursor to show."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jmt_dist.errors import UserError
from jmt_dist.evaluate.predict import UnitPrediction
from jmt_dist.report.figures import AROUSAL, VALENCE, Figure, layout, numbers
from jmt_dist.report.units import UnitResult
from jmt_dist.track.compare import TARGETS

MOST_FRAMES = 4000  # of a drawn trace
PICTURES, SIDE, QUALITY = 60, 84, 80  # of a unit: how many, pixels, JPEG quality; about 150 kB
SPIKE = {"showspikes": True, "spikemode": "across", "spikethickness": 1, "spikecolor": "#777777"}
NOTICE = "The pictures show people of the dataset. Its licence forbids sharing them: keep this file to yourself."
RENDERED = "The pictures are rendered faces of the synthetic dataset: they may be shared."


@dataclass(frozen=True)
class Trace:
    """One unit's figure; `pictures` {frame: JPEG as a data address}, {} where none are embedded."""

    unit: str
    title: str
    figure: Figure
    pictures: dict[int, str]


def choose_units(units: Sequence[UnitResult], wanted: Sequence[str], each: int = 2) -> list[UnitResult]:
    """The units asked for, else the best and the worst. Raises UserError where one asked for is not in the fold."""
    known = {unit.unit: unit for unit in units}
    strange = [name for name in wanted if name not in known]
    if strange:
        fold = units[0].fold if units else "the fold"
        raise UserError(f"fold {fold} does not validate on unit {strange[0]}", f"Its units: {', '.join(sorted(known)[:20])}.")
    if wanted:
        return [known[name] for name in wanted]
    scored = [unit for unit in units if unit.scores is not None]
    return scored if len(scored) <= 2 * each else [*scored[:each], *scored[-each:]]


def make_traces(chosen: Sequence[UnitResult], predictions: Mapping[str, UnitPrediction], shards: Path | None) -> list[Trace]:
    """A trace for each unit; with `shards`, pictures of its frames from there."""
    found = []
    for unit in chosen:
        score = unit.scores
        title = unit.unit if score is None else f"{unit.unit}: RMSE {unit.rmse:.3f}, CCC {score.valence:.3f} / {score.arousal:.3f}"
        pictures = {} if shards is None else unit_pictures(shards, unit.unit)
        found.append(Trace(unit.unit, title, trace_figure(predictions[unit.unit]), pictures))
    return found


def trace_figure(unit: UnitPrediction) -> Figure:
    """Prediction and annotation of both targets over the frames of a unit."""
    keep = np.unique(np.linspace(0, len(unit.va) - 1, min(len(unit.va), MOST_FRAMES)).astype(int))
    frames = (keep + 1).tolist()
    data: list[dict[str, Any]] = []
    for c, colour in enumerate((VALENCE, AROUSAL)):
        for name, values, style in (
            ("annotation", unit.labels, {"color": "black", "width": 2}),
            ("prediction", unit.va, {"color": colour, "width": 1.3}),
        ):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": f"{TARGETS[c]}: {name}",
                    "x": frames,
                    "y": numbers(values[keep, c], 3),
                    "line": style,
                    "xaxis": "x",
                    "yaxis": "y" if c == 0 else "y2",
                    "hovertemplate": f"{name} %{{y:.3f}}<extra>{TARGETS[c]}</extra>",
                }
            )
    axes = {
        "xaxis": {
            "title": {"text": "frame"},
            "anchor": "y2",
            "showspikes": True,
            "spikemode": "across",
            "spikethickness": 1,
            "spikecolor": "#777777",
        },
        "yaxis": {"range": [-1.05, 1.05], "domain": [0.54, 1], "title": {"text": "valence"}},
        "yaxis2": {"range": [-1.05, 1.05], "domain": [0, 0.46], "title": {"text": "arousal"}},
    }
    return {"data": data, "layout": layout(460, hovermode="x unified", hoversubplots="axis", **axes)}


def unit_pictures(shards: Path, unit: str) -> dict[int, str]:
    """About `PICTURES` frames of a unit, evenly spread, as small JPEGs {frame: data address}; frames without a face are left out.

    Raises UserError where the shards do not hold the unit.
    """
    from PIL import Image

    from jmt_dist.data.geometry import LEAD, PHASES, SEGMENT, SIZE, STEP, STRIP
    from jmt_dist.data.sample import PRESENT_MEMBER, STRIP_MEMBER, key
    from jmt_dist.data.shards import open_shards
    from jmt_dist.data.strip import decode
    from jmt_dist.data.tars import parse_index, read_entry

    manifest = open_shards(shards)
    rows = next((one.rows for one in manifest.units if one.name == unit), 0)
    if not rows:
        raise UserError(f"there is no unit {unit} in {shards}", "The run was trained on other shards: leave out frames=true.")
    wanted: dict[str, list[tuple[int, int]]] = {}
    for frame in np.unique(np.linspace(1, rows, min(rows, PICTURES)).astype(int)).tolist():
        m, rest = divmod(frame - 1, SEGMENT)
        wanted.setdefault(key(unit, m, rest % PHASES), []).append((frame, LEAD + rest // STEP))
    found: dict[int, str] = {}
    for shard in manifest.shards:
        entries = [entry for entry in parse_index((shards / shard.index).read_text(encoding="ascii")) if entry.key in wanted]
        if not entries:
            continue
        with (shards / shard.name).open("rb") as file:
            for entry in entries:
                members = read_entry(file, entry)
                strip: NDArray[np.uint8] = np.asarray(decode(members[STRIP_MEMBER])).reshape(STRIP, SIZE, SIZE, 3)
                present = members[PRESENT_MEMBER]
                for frame, place in wanted[entry.key]:
                    if present[place]:
                        found[frame] = _address(Image.fromarray(strip[place]))
    return dict(sorted(found.items()))


def _address(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.resize((SIDE, SIDE)).save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
