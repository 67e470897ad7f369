"""The sound laid down for a video goes with the last shard that needs it, and comes back where a finished shard is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmt_dist.config import PackOptions
from jmt_dist.data import pack_sound as sound_module
from jmt_dist.data import pack_steps as steps_module
from jmt_dist.data import pack_video as video_module
from jmt_dist.data.pack import pack
from jmt_dist.data.pack_part import plan_parts
from jmt_dist.data.sample import parse_key
from jmt_dist.data.shards import open_shards
from jmt_dist.data.tars import parse_index

from .packing import contents, options, quiet

ROOT = Path(__file__).parents[2]
SMALL = 3  # samples per shard: 12 shards of the tree's 36 samples, so that videos are done with at different times
KILLED = """
import os, signal, sys
from jmt_dist.config import PackOptions
from jmt_dist.data import pack_sound, pack_steps
from jmt_dist.data.pack import pack
source, out, where, last = sys.argv[1:]
shard, drop = pack_steps.pack_shard, pack_sound.Sounds.drop
made = 0
def shard_and_die(task):
    global made
    if where == "before" and made == int(last):
        os.kill(os.getpid(), signal.SIGKILL)
    made += 1
    return shard(task)
def drop_and_die(self):
    if where == "between" and made == int(last):
        os.kill(os.getpid(), signal.SIGKILL)  # the shard is published, the sound that nothing needs any more is still there
    drop(self)
pack_steps.pack_shard, pack_sound.Sounds.drop = shard_and_die, drop_and_die
pack(PackOptions(source=source, out=out, samples_per_shard=3, workers=1), print)
"""


def small(tree: Path, out: Path, **changes: Any) -> PackOptions:
    return options(tree, out, samples_per_shard=SMALL, **changes)


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree packed without disturbance; to be read only."""
    out = tmp_path_factory.mktemp("whole") / "s"
    pack(small(tree, out), quiet)
    return out


@pytest.fixture(scope="module")
def needs(whole: Path) -> dict[str, set[str]]:
    """The tars with samples of each video, read from the indexes of the finished shards."""
    found: dict[str, set[str]] = {}
    for index in whole.glob("*.idx"):
        for entry in parse_index(index.read_text()):
            found.setdefault(parse_key(entry.key)[0], set()).add(f"{index.stem}.tar")
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the videos whose containers are decoded."""
    read: list[str] = []
    real = video_module.read_media
    for module in (video_module, sound_module):
        monkeypatch.setattr(module, "read_media", lambda path: [read.append(path.stem), real(path)][1])
    yield read


def sounds(out: Path) -> set[str]:
    return {path.parent.name.replace("%2E", ".") for path in out.glob(".work/videos/*/pcm.npy")}


def needed(needs: dict[str, set[str]], out: Path) -> set[str]:
    """Videos of which a shard is still to be made; a shard's result is the last of it to be written."""
    made = {path.stem for path in out.glob(".work/shards/*.tar.json")}
    return {video for video, names in needs.items() if names - made}


@pytest.mark.parametrize("workers", [1, 2])
def test_sound_goes_with_the_last_shard_that_needs_it(
    workers: int, whole: Path, needs: dict[str, set[str]], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "s", []
    real = sound_module.Sounds.drop

    def watched(self: Any) -> None:
        before = needed(needs, out)  # two workers may publish another shard meanwhile: there are at most as many as now needed
        real(self)
        there = sounds(out)
        assert needed(needs, out) <= there <= before
        seen.append(len(there))

    monkeypatch.setattr(sound_module.Sounds, "drop", watched)
    pack(small(tree, out, workers=workers), quiet)
    assert len(seen) == 13 and seen[0] == 8 and seen == sorted(seen, reverse=True) and seen[-1] == 0
    assert any(0 < count < 8 for count in seen)  # one by one, not all at the end
    assert contents(out) == contents(whole)


def test_jobs_side_by_side_drop_what_none_of_them_needs(
    whole: Path, needs: dict[str, set[str]], tree: Path, tmp_path: Path, decoded: list[str]
) -> None:
    out = tmp_path / "s"
    steps = dict(plan_parts(small(tree, out), 3, quiet))
    for call in steps["videos"]:
        assert call() == []
    left = []
    for call in steps["shards"]:
        assert call() == []
        assert sounds(out) == needed(needs, out)  # what another job's shards need stays
        left.append(len(sounds(out)))
    assert left[0] > 0 and left[-1] == 0
    assert steps["end"][0]() == [] and contents(out) == contents(whole)
    assert sorted(decoded) == sorted(needs)  # each once


@pytest.mark.parametrize("where", ["before", "between"])
def test_after_a_kill_the_rest_is_made_without_decoding(
    where: str, whole: Path, needs: dict[str, set[str]], tree: Path, tmp_path: Path, decoded: list[str]
) -> None:
    """SIGKILL at a shard that follows the first deletion, or between a shard and the deletion that follows it."""
    out, gone = tmp_path / "s", []
    for made in range(12):  # how many shards until a video is done with
        names = {f"{number:05d}.tar" for number in range(made)}
        gone = [video for video, wanted in needs.items() if wanted <= names]
        if gone:
            break
    killed = subprocess.run([sys.executable, "-c", KILLED, tree, out, where, str(made)], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(out.glob("*.tar"))) == made < 12
    assert sounds(out) == (set(needs) - set(gone) if where == "before" else set(needs))
    pack(small(tree, out), quiet)
    assert decoded == [] and contents(out) == contents(whole)


def test_a_lost_shard_decodes_again_what_is_gone_and_needed(
    whole: Path, needs: dict[str, set[str]], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    out = tmp_path / "s"
    real = steps_module.pack_shard

    def interrupted(task: Any) -> Any:
        if task.name == "00011.tar":
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr(steps_module, "pack_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(small(tree, out), quiet)
    monkeypatch.setattr(steps_module, "pack_shard", real)
    there = sounds(out)
    assert there == needs_of_shard(needs, "00011.tar") and there != set(needs)
    lost = next(name for name in (f"{k:05d}.tar" for k in range(11)) if needs_of_shard(needs, name) - there)
    (out / lost).unlink()
    decoded.clear()
    pack(small(tree, out), quiet)
    assert sorted(decoded) == sorted(needs_of_shard(needs, lost) - there)
    assert contents(out) == contents(whole) and open_shards(out).samples == 36


def needs_of_shard(needs: dict[str, set[str]], name: str) -> set[str]:
    return {video for video, names in needs.items() if name in names}


def test_a_source_that_changed_meanwhile_is_refused(tree: Path, tmp_path: Path) -> None:
    """Sound of another length in place of what the finished shards hold would be a silent mixture."""
    from jmt_dist.affwild2.layout import Unit
    from jmt_dist.data.pack_video import VideoTask, prepare_video
    from jmt_dist.errors import UserError

    from . import tree as made

    made.write_unit(tmp_path, "u", 40, 1)
    labels = tmp_path / made.LABELS / "Train_Set" / "u.txt"
    media = tmp_path / "batch1" / "u.avi"
    unit = Unit("u", "u", "train", labels, (tmp_path / "cropped_aligned" / "u",), media, 40)
    task = VideoTask(tmp_path / "work", "u", (unit,))
    (tmp_path / "work" / "videos").mkdir(parents=True)
    prepare_video(task)
    path = tmp_path / "work" / "videos" / "u" / "pcm.npy"
    first = np.load(path)
    path.unlink()
    sound_module._decode_again(task)
    assert np.array_equal(np.load(path), first)
    path.unlink()
    made.write_video(media, 40, 30, made.sound(1, 1.0))
    with pytest.raises(UserError, match="is not what it was") as error:
        sound_module._decode_again(task)
    assert error.value.remedy and not path.exists()
