"""Every way the releases and their users lay Aff-Wild2 out on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jmt_dist.affwild2 import release
from jmt_dist.affwild2.layout import find_dataset
from jmt_dist.affwild2.release import Counts

from .laid import SAMPLE, TEST_LIST, TRAIN, VALIDATION, by_name, labels, put, sample, sentences


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        (TRAIN, VALIDATION),
        ("VA_Estimation_Challenge/Train_Set", "VA_Estimation_Challenge/Validation_Set"),
        ("6th_ABAW_Annotations/VA_Estimation_Challenge/Train_Set", "6th_ABAW_Annotations/VA_Estimation_Challenge/Validation_Set"),
        ("annotations/VA_Set/Training_Set", "annotations/VA_Set/Validation_Set"),
        ("VA_Set/Train_Set", "VA_Set/Validation_Set"),
        ("VA_annotations/Train_Set", "VA_annotations/Val_Set"),
        ("annotations/Train_Set", "annotations/Validation_Set"),
        ("Train_Set", "Validation_Set"),
        ("Aff-Wild2/annotations/VA_Set/train_set", "Aff-Wild2/annotations/VA_Set/validation_set"),
    ],
)
def test_annotation_spellings(tmp_path: Path, train: str, validation: str) -> None:
    labels(tmp_path / train / "12.txt", rows=4)
    labels(tmp_path / validation / "video7.txt", rows=2)
    units = by_name(find_dataset(tmp_path))
    assert [(u.name, u.split, u.rows) for u in units.values()] == [("12", "train", 4), ("video7", "validation", 2)]
    assert units["12"].labels == tmp_path / train / "12.txt"


def test_other_challenges_are_not_read(tmp_path: Path) -> None:
    labels(tmp_path / TRAIN / "a.txt")
    for other in ("EXPR_Classification_Challenge", "AU_Detection_Challenge", "Expression_Set", "AUSet", "MTL_Challenge"):
        put(tmp_path / "annotations" / other / "Train_Set/b.txt", "Neutral,Anger\n0\n")
    put(tmp_path / "names_of_videos_in_each_test_set/Expression_Classification_Challenge_test_set_release.txt", "c\n")
    put(tmp_path / "names_of_videos_in_each_test_set/Action_Unit_Detection_Challenge_test_set_release.txt", "d\n")
    put(tmp_path / "test_set_examples/CVPR_6th_ABAW_EXPR_test_set_example.txt", "h\ne/00001.jpg,0\n")
    dataset = find_dataset(tmp_path)
    assert list(by_name(dataset)) == ["a"]
    assert not any("labels" in sentence for _, sentence in sentences(dataset))


def test_two_annotation_folders_are_never_mixed(tmp_path: Path) -> None:
    labels(tmp_path / TRAIN / "a.txt", rows=5)
    labels(tmp_path / "annotations/VA_Set/Training_Set/a.txt", rows=9)
    labels(tmp_path / "annotations/VA_Set/Training_Set/b.txt")
    dataset = find_dataset(tmp_path)
    assert {name: unit.rows for name, unit in by_name(dataset).items()} == {"a": 5}
    expected = "labels in annotations/VA_Set are not read: those in annotations/VA_Estimation_Challenge are"
    assert ("", expected) in sentences(dataset)


@pytest.mark.parametrize("name", ["{}_ABAW_Annotations", "{} ABAW Annotations", "abaw-{}"])
def test_of_several_editions_the_newest_labels_are_read(tmp_path: Path, name: str) -> None:
    for edition, rows in (("6th", 6), ("10th", 10), ("9th", 9)):
        labels(tmp_path / f"{name.format(edition)}/VA_Estimation_Challenge/Train_Set/a.txt", rows)
    labels(tmp_path / "VA_Estimation_Challenge/Train_Set/a.txt", 3)  # which edition, nobody knows
    dataset = find_dataset(tmp_path)
    assert [unit.rows for unit in dataset.units] == [10]
    assert sum("labels in" in sentence for _, sentence in sentences(dataset)) == 3


def test_crops_of_both_folders(tmp_path: Path) -> None:
    for unit in ("a", "b", "c", "d"):
        labels(tmp_path / TRAIN / f"{unit}.txt")
    put(tmp_path / "cropped_aligned/a/00001.jpg")
    put(tmp_path / "cropped_aligned_new_50_vids/b/00001.jpg")
    put(tmp_path / "cropped_aligned/c/00001.jpg")
    put(tmp_path / "cropped_aligned_new_50_vids/c/00002.jpg")
    units = by_name(find_dataset(tmp_path))
    old, new = tmp_path / "cropped_aligned", tmp_path / "cropped_aligned_new_50_vids"
    assert [units[u].crops for u in "abcd"] == [(old / "a",), (new / "b",), (old / "c", new / "c"), ()]


def test_crops_in_a_folder_of_their_own_name(tmp_path: Path) -> None:
    labels(tmp_path / TRAIN / "a.txt")
    put(tmp_path / "cropped_aligned_new_50_vids/cropped_aligned_new_50_vids/a/00001.jpg")
    inner = tmp_path / "cropped_aligned_new_50_vids/cropped_aligned_new_50_vids"
    assert by_name(find_dataset(tmp_path))["a"].crops == (inner / "a",)


def test_media_in_any_batch_with_any_case(tmp_path: Path) -> None:
    places = {"1": "batch1/1.AVI", "2": "batch2/2.mp4", "3": "batch10/3.Mp4", "4": "Batch_3/4.avi", "5": "batch2/inner/5.mp4"}
    for unit, place in places.items():
        labels(tmp_path / TRAIN / f"{unit}.txt")
        put(tmp_path / place)
    labels(tmp_path / TRAIN / "6.txt")
    put(tmp_path / "batch1/6.wav")
    units = by_name(find_dataset(tmp_path))
    assert {name: unit.media for name, unit in units.items()} == {u: tmp_path / p for u, p in places.items()} | {"6": None}


@pytest.mark.parametrize(
    ("unit", "media", "video"),
    [
        ("video59_right", ["video59"], "video59"),
        ("46-30-484x360_left", ["46-30-484x360"], "46-30-484x360"),
        ("video59_right", [], "video59"),  # no media at all: still grouped with the other side
        ("video59_right", ["video59_right", "video59"], "video59_right"),
        ("bright_light", [], "bright_light"),
        ("right_hand", ["right_hand"], "right_hand"),
        ("left_right_left", ["left_right"], "left_right"),  # one suffix, at the end
        ("a_LEFT", ["a"], "a_LEFT"),
        ("_left", [], "_left"),
    ],
)
def test_suffix_rule(tmp_path: Path, unit: str, media: list[str], video: str) -> None:
    labels(tmp_path / TRAIN / f"{unit}.txt")
    for stem in media:
        put(tmp_path / "batch1" / f"{stem}.mp4")
    found = by_name(find_dataset(tmp_path))[unit]
    assert found.video == video
    assert found.media == (tmp_path / "batch1" / f"{video}.mp4" if video in media else None)


def test_main_and_side_share_a_video(tmp_path: Path) -> None:
    for unit in ("video59", "video59_right"):
        labels(tmp_path / VALIDATION / f"{unit}.txt")
        put(tmp_path / "cropped_aligned" / unit / "00001.jpg")
    put(tmp_path / "batch1/video59.mp4")
    units = by_name(find_dataset(tmp_path))
    assert {u.video for u in units.values()} == {"video59"}
    assert [units[u].crops[0].name for u in ("video59", "video59_right")] == ["video59", "video59_right"]


def test_test_units_take_their_rows_from_the_sample_file(tmp_path: Path) -> None:
    labels(tmp_path / TRAIN / "a.txt")
    put(tmp_path / TEST_LIST, "t2\r\nt1_left\r\n\r\n")
    file = sample(tmp_path / SAMPLE, t2=7, t1_left=2)
    put(tmp_path / "batch1/t1.mp4")
    dataset = find_dataset(tmp_path)
    units = by_name(dataset)
    assert [(u.name, u.split, u.rows, u.labels) for u in units.values() if u.split == "test"] == [
        ("t1_left", "test", 2, None),
        ("t2", "test", 7, None),
    ]
    assert units["t1_left"].media == tmp_path / "batch1/t1.mp4"
    assert dataset.sample_file == file


@pytest.mark.parametrize(
    "name", ["CVPR_5th_ABAW_VA_test_set_sample.txt", "ICCV_9th_ABAW_VA_test_set_sample.txt", "VA_test_set_example.txt"]
)
def test_sample_file_names(tmp_path: Path, name: str) -> None:
    sample(tmp_path / "examples" / name, t=4)
    dataset = find_dataset(tmp_path)
    assert [(u.name, u.rows) for u in dataset.units] == [("t", 4)]


def test_the_newest_sample_file_decides(tmp_path: Path) -> None:
    sample(tmp_path / "test_set_examples/CVPR_10th_ABAW_VA_test_set_example.txt", t=10)
    sample(tmp_path / "test_set_examples/ICCV_9th_ABAW_VA_test_set_example.txt", t=9)
    sample(tmp_path / SAMPLE, t=6)
    dataset = find_dataset(tmp_path)
    assert [(u.name, u.rows) for u in dataset.units] == [("t", 10)]
    assert sum("is not read" in sentence for _, sentence in sentences(dataset)) == 2


def test_list_and_sample_that_disagree(tmp_path: Path) -> None:
    put(tmp_path / TEST_LIST, "both\nlisted\n")
    sample(tmp_path / SAMPLE, both=3, sampled=5)
    dataset = find_dataset(tmp_path)
    assert {u.name: u.rows for u in dataset.units} == {"both": 3, "listed": 0, "sampled": 5}
    assert {unit for unit, _ in sentences(dataset) if unit} == {"listed", "sampled"}


def test_duplicates_are_settled_and_noted(tmp_path: Path) -> None:
    labels(tmp_path / TRAIN / "twice.txt", rows=4)
    labels(tmp_path / VALIDATION / "twice.txt", rows=8)
    labels(tmp_path / TRAIN / "hidden.txt", rows=4)
    put(tmp_path / TEST_LIST, "hidden\n")
    sample(tmp_path / SAMPLE, hidden=6)
    for place in ("batch10/twice.mp4", "batch2/twice.mp4", "batch2/twice.avi"):
        put(tmp_path / place)
    dataset = find_dataset(tmp_path)
    units = by_name(dataset)
    assert (units["twice"].split, units["twice"].rows) == ("train", 4)
    assert units["twice"].media == tmp_path / "batch2/twice.avi"  # batch2 before batch10, then by name
    assert (units["hidden"].split, units["hidden"].rows, units["hidden"].labels) == ("test", 6, None)
    noted = [unit for unit, _ in sentences(dataset) if unit]
    assert sorted(noted) == ["hidden", "twice", "twice", "twice"]


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    labels(tmp_path / TRAIN / "a.txt")
    put(tmp_path / "batch1/a.mp4")
    (tmp_path / TRAIN / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    put(tmp_path / TRAIN / ".DS_Store")
    put(tmp_path / "batch1/._a.mp4")
    labels(tmp_path / ".backup" / TRAIN / "b.txt")
    put(tmp_path / "cropped_aligned/.DS_Store")
    (tmp_path / "cropped_aligned/._a").mkdir()
    dataset = find_dataset(tmp_path)
    assert list(by_name(dataset)) == ["a"]
    assert dataset.problems == ()


def test_crop_folders_are_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three million files: listing them would take minutes on a network file system."""
    labels(tmp_path / TRAIN / "a.txt")
    put(tmp_path / "cropped_aligned/a/00001.jpg")
    put(tmp_path / "cropped/a/00001.jpg")
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: (listed.append(os.path.relpath(folder, tmp_path)), scandir(folder))[1])
    find_dataset(tmp_path)
    assert "cropped_aligned" in listed
    assert not {"cropped_aligned/a", "cropped", "cropped/a"} & set(listed)


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for unit in ("10", "9", "video2", "1-30-1x1"):
        labels(tmp_path / TRAIN / f"{unit}.txt")
        for batch in ("batch1", "batch2"):
            put(tmp_path / batch / f"{unit}.mp4")
    labels(tmp_path / "annotations/VA_Set/Train_Set/9.txt")
    straight = find_dataset(tmp_path)
    scandir = os.scandir

    class Reversed:
        def __init__(self, folder: Path) -> None:
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr(os, "scandir", Reversed)
    assert find_dataset(tmp_path) == straight
    assert [u.name for u in straight.units] == ["1-30-1x1", "10", "9", "video2"]


def test_release_by_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real counts need real files, so a release with this tree's counts is put beside them in the table."""
    labels(tmp_path / TRAIN / "a.txt", rows=4)
    labels(tmp_path / TRAIN / "b.txt", rows=3)
    labels(tmp_path / VALIDATION / "c.txt", rows=2)
    sample(tmp_path / SAMPLE, t=5)
    assert find_dataset(tmp_path).release == "unknown (2 train / 1 validation / 1 test units; 7 / 2 / 5 rows)"
    tiny = {"train": Counts(2, 7, 0), "validation": Counts(1, 2, 0), "test": Counts(1, 5)}
    monkeypatch.setitem(release.RELEASES, "tiny", tiny)
    assert find_dataset(tmp_path).release == "tiny"
    labels(tmp_path / TRAIN / "b.txt", rows=4)  # one row more: another release
    assert find_dataset(tmp_path).release.startswith("unknown")
    put(tmp_path / "fixture.json", "{}")
    assert find_dataset(tmp_path).release == "fixture"
