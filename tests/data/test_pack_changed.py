"""A dataset that changes between two runs: what an earlier run laid down holds for the same files only, and nothing is mixed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jmt_dist.affwild2.layout import find_dataset
from jmt_dist.data import pack_steps as steps_module
from jmt_dist.data import pack_video as video_module
from jmt_dist.data.pack import pack
from jmt_dist.data.pack_steps import video_tasks
from jmt_dist.data.pack_video import VideoResult, prepare_video
from jmt_dist.data.sample import parse_key
from jmt_dist.data.tars import parse_index
from jmt_dist.errors import UserError

from . import tree as made
from .packing import contents, options, quiet

SAMPLE = "test_set_examples/CVPR_6th_ABAW_VA_test_set_example.txt"
ABSENT: dict[str, tuple[str, Callable[[VideoResult], object], object, object]] = {  # what comes late, what is seen of it before and after
    "video": ("batch1/u.avi", lambda result: (result.frames, result.seconds > 0), (0, False), (20, True)),
    "crop": ("cropped_aligned/u/00003.jpg", lambda result: result.units[0].crops, 19, 20),
    "sample file": (SAMPLE, lambda result: result.units[0].rows, 20, 19),
}


def first_pass(root: Path, work: Path) -> dict[str, VideoResult]:
    return {task.video: prepare_video(task) for task in video_tasks(find_dataset(root), work)}


@pytest.mark.parametrize("what", ABSENT)
def test_what_came_after_an_interruption_is_not_missed(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, seen, before, after = ABSENT[what]
    root, work, away = tmp_path / "tree", tmp_path / "work", tmp_path / "away"
    made.write_test_unit(root, "u", 20, 1)
    sample = root / SAMPLE
    sample.write_text("\n".join(sample.read_text().splitlines()[:-1]) + "\n")  # 19 rows, the video has 20 frames
    if what != "sample file":
        made.write_unit(root, "v", 20, 2)  # of a video that does not change
        sample.write_text(sample.read_text() + "u/00020.jpg,0,0\n")
    (root / place).rename(away)
    assert seen(first_pass(root, work)["u"]) == before
    away.rename(root / place)
    assert seen(first_pass(root, work)["u"]) == after
    monkeypatch.setattr(video_module, "read_media", lambda path: pytest.fail(f"{path} was read again"))
    assert seen(first_pass(root, work)["u"]) == after


def test_shards_of_other_files_are_not_mixed_with_those_there_are(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = tmp_path / "tree", tmp_path / "s"
    shutil.copytree(tree, root)
    real, finished = steps_module.pack_shard, []

    def interrupted(task: Any) -> Any:
        if finished:
            raise KeyboardInterrupt
        finished.append(task.name)
        return real(task)

    with monkeypatch.context() as patch:
        patch.setattr(steps_module, "pack_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(options(root, out), quiet)
    tars = {name: value for name, value in contents(out).items() if name.endswith(".tar")}
    made.write_video(root / "batch1" / "d4.avi", 48, 30, made.sound(4, 1.0))  # same rows, other sound
    with pytest.raises(UserError, match="is half packed with other options or from other files than") as error:
        pack(options(root, out), quiet)
    assert "remove" in error.value.remedy and len(tars) == 1
    assert {name: value for name, value in contents(out).items() if name.endswith(".tar")} == tars


def test_a_lost_shard_is_not_made_of_other_files(packed: Path, tree: Path, tmp_path: Path) -> None:
    """The manifest says what it was; crops that differ are seen in the shard alone."""
    root, out = tmp_path / "tree", tmp_path / "s"
    shutil.copytree(tree, root)
    shutil.copytree(packed, out)
    report = json.loads((out / "pack-report.json").read_text())
    (out / "pack-report.json").write_text(json.dumps({**report, "source": str(root)}))
    unit, m, p = parse_key(parse_index((out / "00001.idx").read_text())[0].key)
    crop = root / "cropped_aligned" / unit / f"{256 * m + 1 + p:05d}.jpg"
    good = crop.read_bytes()
    crop.write_bytes(made.jpeg(made.picture(999)))
    (out / "00001.tar").unlink()
    for _ in range(2):  # neither now nor the next time
        with pytest.raises(UserError, match=r"00001\.tar, made again, is not what it was"):
            pack(options(root, out), quiet)
        assert not (out / "00001.tar").exists() and (out / "manifest.json").read_bytes() == (packed / "manifest.json").read_bytes()
    crop.write_bytes(good)
    pack(options(root, out), quiet)
    assert (out / "00001.tar").read_bytes() == (packed / "00001.tar").read_bytes()


def test_a_lost_shard_is_made_again_once_the_dataset_is_back(packed: Path, tree: Path, tmp_path: Path) -> None:
    """What a refused run found in other files, which it wrote down, does not speak against the files of then."""
    root, out = tmp_path / "tree", tmp_path / "s"
    shutil.copytree(tree, root)
    shutil.copytree(packed, out)
    report = json.loads((out / "pack-report.json").read_text())
    (out / "pack-report.json").write_text(json.dumps({**report, "source": str(root)}))
    for tar in out.glob("*.tar"):
        tar.unlink()
    made.write_video(root / "batch1" / "d4.avi", 48, 30, made.sound(4, 1.0))  # same rows, other sound
    with pytest.raises(UserError, match="made again, is not what it was") as error:
        pack(options(root, out), quiet)
    assert error.value.remedy.startswith("Put the dataset back as it was")
    shutil.copy2(tree / "batch1" / "d4.avi", root / "batch1" / "d4.avi")
    pack(options(root, out), quiet)
    assert all((out / tar.name).read_bytes() == tar.read_bytes() for tar in packed.glob("*.tar"))
