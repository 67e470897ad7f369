"""Folders and files that are missing, empty, closed or broken: noted where packing can go on, else one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jmt_dist.affwild2.layout import find_dataset
from jmt_dist.errors import UserError

from .laid import TRAIN, by_name, labels, put, sentences


def test_a_folder_that_may_not_be_listed_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lost+found of a mounted disk belongs to root; the root of the dataset itself must be readable."""
    labels(tmp_path / TRAIN / "a.txt", rows=4)
    (tmp_path / "lost+found").mkdir()
    real = os.scandir

    def guarded(path: Path) -> object:
        if Path(path).name in ("lost+found", forbidden):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    forbidden = ""
    monkeypatch.setattr(os, "scandir", guarded)
    dataset = find_dataset(tmp_path)
    assert [u.name for u in dataset.units] == ["a"]
    assert any(p.what == "folder that cannot be listed" and "lost+found" in p.sentence for p in dataset.problems)
    forbidden = tmp_path.name
    with pytest.raises(UserError, match="cannot be listed: Permission denied"):
        find_dataset(tmp_path)


@pytest.mark.parametrize("place", ["cropped_aligned", "batch1", "batch1/inner", "annotations/VA_Estimation_Challenge/Train_Set"])
def test_a_folder_that_is_needed_must_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """However deep it lies: taken for a folder of no interest, it would hide itself and what comes after it."""
    root = tmp_path / "Aff-Wild2"
    labels(root / TRAIN / "a.txt", rows=4)
    put(root / "batch1/inner/a.mp4")
    put(root / "cropped_aligned/a/00001.jpg")
    real = os.scandir

    def guarded(path: Path) -> object:
        if Path(path) == root / place:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match=f"{place} cannot be listed: Permission denied"):
        find_dataset(tmp_path)


def test_an_empty_label_file_is_noted(tmp_path: Path) -> None:
    labels(tmp_path / TRAIN / "a.txt", rows=0)
    dataset = find_dataset(tmp_path)
    assert by_name(dataset)["a"].rows == 0
    assert [unit for unit, _ in sentences(dataset) if unit] == ["a"]


def test_a_label_file_that_is_no_text_costs_one_unit(tmp_path: Path) -> None:
    folder = tmp_path / "annotations" / "VA_Estimation_Challenge" / "Train_Set"
    folder.mkdir(parents=True)
    (folder / "good.txt").write_text("valence,arousal\n0.1,0.2\n")
    (folder / "broken.txt").write_bytes(b"\x00\xff\xfe\x00" * 50)
    found = find_dataset(tmp_path)
    assert {unit.name: unit.rows for unit in found.units} == {"broken": 0, "good": 1}
    assert [problem.what for problem in found.problems if problem.unit == "broken"] == ["unreadable label file"]


def test_missing_media_and_crops_are_one_note_each(tmp_path: Path) -> None:
    for unit in "abc":
        labels(tmp_path / TRAIN / f"{unit}.txt")
    assert [unit for unit, _ in sentences(find_dataset(tmp_path))] == ["", ""]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder") as error:
        find_dataset(tmp_path / "absent")
    assert error.value.remedy
    with pytest.raises(UserError, match="is a file, not a folder"):
        find_dataset(put(tmp_path / "file"))


def test_nothing_found(tmp_path: Path) -> None:
    put(tmp_path / "batch1/a.mp4")
    put(tmp_path / "notes/train/readme.md")
    with pytest.raises(UserError, match="no valence-arousal labels") as error:
        find_dataset(tmp_path)
    assert "VA_Estimation_Challenge" in error.value.remedy
