"""Pieces of a dataset's folder without pictures or sound."""

from __future__ import annotations

from pathlib import Path

from jmt_dist.affwild2.layout import Dataset, Unit

TRAIN = "annotations/VA_Estimation_Challenge/Train_Set"
VALIDATION = "annotations/VA_Estimation_Challenge/Validation_Set"
TEST_LIST = "names_of_videos_in_each_test_set/Valence_Arousal_Estimation_Challenge_test_set_release.txt"
SAMPLE = "test_set_examples/CVPR_6th_ABAW_VA_test_set_example.txt"


def put(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def labels(path: Path, rows: int = 3) -> Path:
    return put(path, "valence,arousal\n" + "0.1,0.2\n" * rows)


def sample(path: Path, **rows: int) -> Path:
    lines = [f"{unit}/{i:05d}.jpg,," for unit, count in rows.items() for i in range(1, count + 1)]
    return put(path, "\n".join(["image_location,valence,arousal", *lines]) + "\n")


def by_name(dataset: Dataset) -> dict[str, Unit]:
    return {unit.name: unit for unit in dataset.units}


def sentences(dataset: Dataset) -> list[tuple[str, str]]:
    return [(problem.unit, problem.sentence) for problem in dataset.problems]
