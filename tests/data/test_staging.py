"""Copies of shards on a node's own disk: made once by processes that begin at once, verified, removed where room is short."""

from __future__ import annotations

import fcntl
import multiprocessing as mp
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from jmt_dist.config import FoldOptions, PackOptions
from jmt_dist.data import staging
from jmt_dist.data.pack import pack
from jmt_dist.data.shards import fold_shards, open_shards
from jmt_dist.errors import UserError
from tests.data.tree import write_unit


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staging")
    for k in range(6):
        write_unit(folder / "tree", f"u{k}", 40, k, "Train_Set" if k < 4 else "Validation_Set")
    options = PackOptions(source=str(folder / "tree"), out=str(folder / "shards"), workers=1, samples_per_shard=4)
    pack(options, say=lambda line: None)
    return folder / "shards"


def stage(shards: Path, base: Path, answers: mp.Queue[int], began: mp.synchronize.Barrier) -> None:
    manifest = open_shards(shards)
    part = fold_shards(shards, FoldOptions(), "official", "train")
    began.wait()
    answers.put(staging.stage_in(part, manifest, staging.staging_folder(str(base), manifest)))


def test_jobs_that_begin_at_once_copy_each_tar_once(shards: Path, tmp_path: Path) -> None:
    context = mp.get_context("fork")
    answers, began = context.Queue(), context.Barrier(3)
    jobs = [context.Process(target=stage, args=(shards, tmp_path, answers, began)) for _ in range(3)]
    for job in jobs:
        job.start()
    copied = [answers.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join()
    manifest, part = open_shards(shards), fold_shards(shards, FoldOptions(), "official", "train")
    assert len(part.tars) > 1 and sum(copied) == sum(tar.stat().st_size for tar in part.tars)
    folder = staging.staging_folder(str(tmp_path), manifest)
    there = staging.staged(part, folder)
    assert [tar.read_bytes() for tar in there.tars] == [tar.read_bytes() for tar in part.tars]
    assert (there.indexes, there.samples) == (part.indexes, part.samples)
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {*(tar.name for tar in part.tars), "manifest.json"}
    assert staging.stage_in(part, manifest, folder) == 0


def test_a_damaged_tar_is_no_copy(shards: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(shards, tmp_path / "broken")
    manifest, part = open_shards(broken), fold_shards(broken, FoldOptions(), "official", "train")
    data = bytearray(part.tars[0].read_bytes())
    data[700] ^= 1
    part.tars[0].write_bytes(data)
    with pytest.raises(UserError, match="is not what was packed"):
        staging.stage_in(part, manifest, tmp_path / "jmt-x")
    assert not (tmp_path / "jmt-x" / part.tars[0].name).exists()


def test_a_folder_removed_while_one_waits_for_it_is_made_again(tmp_path: Path) -> None:
    folder, found = tmp_path / "jmt-0", []
    folder.mkdir()
    with (folder / ".use").open("ab") as remover:
        fcntl.flock(remover, fcntl.LOCK_EX)
        waiter = threading.Thread(target=lambda: found.append(staging._use(folder)))
        waiter.start()
        time.sleep(0.1)  # long enough to wait at the lock; shorter tests less, and never wrongly fails
        shutil.rmtree(folder)
    waiter.join(30)
    assert os.path.samestat(os.fstat(found[0].fileno()), (folder / ".use").stat())
    found[0].close()


def test_room_is_made_from_what_nobody_uses(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, part = open_shards(shards), fold_shards(shards, FoldOptions(), "official", "train")
    for name in ("jmt-idle", "jmt-used", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".use").write_bytes(b"")
    import fcntl

    usage, room = shutil.disk_usage, {"free": 0}

    def disk_usage(path: Path) -> object:
        free = 10**12 if not (tmp_path / "jmt-idle").exists() and room["free"] == 0 else 5
        return usage(path)._replace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with (tmp_path / "jmt-used" / ".use").open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        assert staging.stage_in(part, manifest, tmp_path / "jmt-mine") > 0
        assert not (tmp_path / "jmt-idle").exists() and (tmp_path / "jmt-used").exists() and (tmp_path / "theirs").exists()
        room["free"] = 5
        with pytest.raises(UserError, match=r"has 0\.0 GB free, and this fold's shards need"):
            staging.stage_in(part, manifest, tmp_path / "jmt-other")
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_DISK names a variable that this node does not set"):
        staging.staging_folder("$NO_SUCH_DISK", manifest)
    assert os.path.expandvars("$NO_SUCH_DISK") == "$NO_SUCH_DISK"
