"""A full disk, a folder that cannot be written, a source that goes away: one sentence, exit code 1, nothing half-written."""

from __future__ import annotations

import ctypes
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jmt_dist.data import pack as pack_module
from jmt_dist.data import pack_shard as shard_module
from jmt_dist.data import pack_video as video_module
from jmt_dist.data.pack import pack
from jmt_dist.data.shards import open_shards
from jmt_dist.errors import UserError

from .packing import contents, options, quiet
from .tree import LABELS

ROOT = Path(__file__).parents[2]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # of Linux's prctl.h and capability.h


def program(*words: str, limit: int = 0) -> subprocess.CompletedProcess[str]:
    """The packer, under a limit on the size of files: writes beyond it fail as on a full disk (EFBIG, in every process)."""

    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, ROOT / "shards" / "pack_shards.py", *words, "samples_per_shard=8"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limited)


def leftovers(out: Path) -> list[str]:
    """Files under final names, or half-written ones in the work folder, that no finished piece explains."""
    whole = {"pcm.npy", "times.npy", "video.json", "plan.json"}
    names = [path for path in out.rglob("*") if path.is_file()]
    return [str(p.relative_to(out)) for p in names if p.name not in whole and not p.name.endswith((".va.npy", ".crops.npy"))]


@pytest.mark.parametrize(
    ("limit", "workers"), [(100_000, 1), (1_200_000, 1), (1_200_000, 2)], ids=["pass 1", "pass 2", "pass 2, processes"]
)
def test_a_full_disk(limit: int, workers: int, packed: Path, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    done = program(f"source={tree}", f"out={out}", f"workers={workers}", limit=limit)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "Free some space; the same command goes on where it stopped." in done.stderr
    assert leftovers(out) == [] and not list(out.rglob("*.partial"))
    assert program(f"source={tree}", f"out={out}", f"workers={workers}").returncode == 0
    assert contents(out) == contents(packed)


def test_a_folder_that_cannot_be_made(tree: Path) -> None:
    done = program(f"source={tree}", "out=/sys/jmt-shards")  # not even root may write there
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "/sys/jmt-shards: " in done.stderr and "Check the folder, its permissions" in done.stderr


def test_a_file_where_the_folder_should_be(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "s").write_text("mine")
    done = program(f"source={tree}", f"out={tmp_path / 's'}")
    assert done.returncode == 1 and "is not a folder" in done.stderr and (tmp_path / "s").read_text() == "mine"


def _before_sound(patch: pytest.MonkeyPatch, vanish: Callable[[], None]) -> None:
    real = video_module.read_media
    patch.setattr(video_module, "read_media", lambda path: [vanish(), real(path)][1])


def _before_shards(patch: pytest.MonkeyPatch, vanish: Callable[[], None]) -> None:
    real = pack_module.pack_shards
    patch.setattr(pack_module, "pack_shards", lambda *given: [vanish(), real(*given)][1])


def _within_a_shard(patch: pytest.MonkeyPatch, vanish: Callable[[], None]) -> None:
    real, calls = shard_module.make_sample, []

    def make(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 12:  # shards have 8 samples
            vanish()
        return real(*given)

    patch.setattr(shard_module, "make_sample", make)


@pytest.mark.parametrize("when", [_before_sound, _before_shards, _within_a_shard])
def test_a_source_that_goes_away_is_no_dataset_of_missing_crops(
    when: Callable[..., None], packed: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out, away = tmp_path / "tree", tmp_path / "s", tmp_path / "unmounted"
    shutil.copytree(tree, root)

    def vanish() -> None:
        if root.exists():
            root.rename(away)

    with monkeypatch.context() as patch:
        when(patch, vanish)
        with pytest.raises(UserError, match="was there and is gone") as error:
            pack(options(root, out), quiet)
    assert "still mounted" in error.value.remedy
    tars = sorted(path.name for path in out.rglob("*.tar"))
    assert tars == (["00000.tar"] if when is _within_a_shard else []) and not list(out.rglob("*.partial"))
    away.rename(root)
    pack(options(root, out), quiet)
    open_shards(out)
    assert {n: h for n, h in contents(out).items() if n.endswith(".tar")} == {
        n: h for n, h in contents(packed).items() if n.endswith(".tar")
    }


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    done = program(f"source={tmp_path / 'nothing'}", f"out={tmp_path / 's'}")
    assert done.returncode == 1 and done.stderr.startswith("pack_shards.py: there is no folder") and not (tmp_path / "s").exists()


def without_privilege() -> None:
    """Root may write anywhere and read anything by these two capabilities; whoever has none of them needs nothing done."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


@pytest.mark.slow
def test_folders_of_others(tree: Path, tmp_path: Path) -> None:
    """A shard folder that may not be written: one sentence. Crops and labels that may not be read: their units, and no others."""
    root, out = tmp_path / "tree", tmp_path / "s"
    shutil.copytree(tree, root)
    closed = [root / "cropped_aligned" / "d4", root / LABELS / "Train_Set" / "e5.txt"]
    for path in closed:
        path.chmod(0)
    out.mkdir(mode=0o500)
    command = [sys.executable, ROOT / "shards" / "pack_shards.py", root, out, "samples_per_shard=8", "workers=1"]
    run = partial(subprocess.run, command, capture_output=True, text=True, timeout=120, preexec_fn=without_privilege)
    done = run()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "Check the folder, its permissions" in done.stderr
    assert not list(out.iterdir())
    out.chmod(0o700)
    done = run()
    for path in closed:
        path.chmod(0o700)
    assert done.returncode == 3, done.stderr
    assert "  d4    cropped_aligned/d4 cannot be read: Permission denied" in done.stdout
    assert f"  e5    {LABELS}/Train_Set/e5.txt cannot be read: Permission denied" in done.stdout and "left out: 2" in done.stdout
