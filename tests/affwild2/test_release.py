"""Releases by their counts: those of the real dataset, and what is not quite one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jmt_dist.affwild2.release import RELEASES, Counts, name_release

REAL = {"train": Counts(356, 1_682_057, 2_200), "validation": Counts(76, 383_814, 1_793), "test": Counts(162, 927_210, 0)}


def test_the_real_release_has_the_published_counts() -> None:
    """594 units and 2,993,081 rows, as the challenge's papers say, of them 2,200 + 1,793 without a label."""
    known = RELEASES["ABAW10"]
    assert sum(c.units for c in known.values()) == 594 and sum(c.rows for c in known.values()) == 2_993_081
    assert {s: (c.units, c.rows) for s, c in known.items()} == {s: (c.units, c.rows) for s, c in REAL.items()}
    assert (known["train"].invalid, known["validation"].invalid) == (2_200, 1_793)
    assert name_release(REAL) == "ABAW10"
    assert name_release({split: replace(count, invalid=None) for split, count in REAL.items()}) == "ABAW10"  # labels not read yet


@pytest.mark.parametrize(
    ("split", "change", "said"),
    [
        ("train", {"invalid": 1_913}, "unknown (units and rows of ABAW10, but rows marked -5: 1,913 instead of 2,200 in train)"),
        ("validation", {"invalid": 0}, "unknown (units and rows of ABAW10, but rows marked -5: 0 instead of 1,793 in validation)"),
        ("test", {"rows": 927_211}, "unknown (356 train / 76 validation / 162 test units; 1,682,057 / 383,814 / 927,211 rows)"),
        ("train", {"units": 341}, "unknown (341 train / 76 validation / 162 test units; 1,682,057 / 383,814 / 927,210 rows)"),
    ],
)
def test_any_other_count_is_another_release(split: str, change: dict[str, int], said: str) -> None:
    assert name_release({**REAL, split: replace(REAL[split], **change)}) == said
