"""Where a fixture keeps what belongs to a planned unit."""

from __future__ import annotations

from pathlib import Path

from jmt_dist.affwild2.fixture_plan import UnitPlan, VideoPlan


def labels_of(root: Path, unit: UnitPlan) -> Path:
    folder = {"train": "Train_Set", "validation": "Validation_Set"}[unit.split]
    return root / "annotations" / "VA_Estimation_Challenge" / folder / f"{unit.name}.txt"


def media_of(root: Path, video: VideoPlan) -> Path:
    return root / video.batch / f"{video.stem}{video.suffix}"


def crops_of(root: Path, unit: UnitPlan) -> dict[int, Path]:
    folders = [root / "cropped_aligned" / unit.name, root / "cropped_aligned_new_50_vids" / unit.name]
    return {int(p.stem): p for folder in folders if folder.is_dir() for p in folder.iterdir()}
