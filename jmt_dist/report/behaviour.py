"""What the systems do besides their score: how much they lose where a modality is missing, and how saturated their attention is."""

from __future__ import annotations

from collections.abc import Mapping

from jmt_dist.report.tables import Table
from jmt_dist.track.compare import Score

MISSING = {"audio": "without audio", "visual": "without face"}


def behaviour_table(systems: Mapping[str, Score], fold: str = "") -> Table | None:
    """Average with both modalities and with one withheld, the drop beside, and the share of saturated attention weights.

    `systems`: scores by name, all on `fold` or on those that their names tell. None where none of them was tried without a modality
    and none has attention.
    """
    if not any(score.withheld or score.saturation for score in systems.values()):
        return None
    rows = []
    for name, score in systems.items():
        without = [_drop(score.average, score.withheld.get(modality)) for modality in MISSING]
        weights = " → ".join(f"{score.saturation[when]:.2f}" for when in ("start", "end") if when in score.saturation)
        rows.append((name, f"{score.average:.3f}", *without, weights or "–"))
    note = (
        "Mean over seeds. The features of one modality are 0 in evaluation; brackets: how much lower the average is. "
        "Saturated: share of attention weights below 0.05 or above 0.95, before and after training; – where there is no such number."
    )
    columns = ("system", "average", *MISSING.values(), "saturated weights")
    return Table("A missing modality, and attention" + (f", on fold {fold}" if fold else ""), columns, tuple(rows), note=note)


def _drop(average: float, without: float | None) -> str:
    return "–" if without is None else f"{without:.3f} ({without - average:+.3f})".replace("-", "−")
