"""Label releases, known by their counts; the repository holds no unit's name (the licence forbids sharing them).

Editions of the challenge ship the same units with other labels (the rows marked -5 differ, for one), so a dataset is
given a release's name only where every count is equal, and is called unknown otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Counts:
    """Units of a split, their rows, and the rows marked -5 (None: labels not read yet, or hidden)."""

    units: int
    rows: int
    invalid: int | None = None


RELEASES: dict[str, dict[str, Counts]] = {
    "ABAW10": {  # the split of ABAW5 to ABAW10 with the labels of the 10th edition
        "train": Counts(356, 1_682_057, 2_200),
        "validation": Counts(76, 383_814, 1_793),
        "test": Counts(162, 927_210),
    },
}


def name_release(found: Mapping[str, Counts]) -> str:
    """The release with these counts by split, or `unknown (…)` saying how it differs.

    Where the rows marked -5 are not known yet, units and rows decide.
    """
    for name, known in RELEASES.items():
        if any((found[s].units, found[s].rows) != (known[s].units, known[s].rows) for s in SPLITS):
            continue
        other = [s for s in SPLITS if None not in (found[s].invalid, known[s].invalid) and found[s].invalid != known[s].invalid]
        if not other:
            return name
        marked = ", ".join(f"{found[s].invalid:,} instead of {known[s].invalid:,} in {s}" for s in other)
        return f"unknown (units and rows of {name}, but rows marked -5: {marked})"
    units = " / ".join(f"{found[s].units} {s}" for s in SPLITS)
    rows = " / ".join(f"{found[s].rows:,}" for s in SPLITS)
    return f"unknown ({units} units; {rows} rows)"
