"""Packing by the jobs of a site gives the bytes of packing in one process, and says the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jmt_dist.cluster import slurm
from jmt_dist.cluster.array import forget_steps
from jmt_dist.config import PackOptions
from jmt_dist.data import pack_part as part_module
from jmt_dist.data import pack_video as video_module
from jmt_dist.data.pack import pack
from jmt_dist.data.pack_part import PackPart, plan_parts
from jmt_dist.errors import UserError

from ..cluster import fakeslurm
from .packing import contents, options, quiet

ROOT = Path(__file__).parents[2]


def program(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "shards" / "pack_shards.py", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_three_workers_and_the_jobs_of_a_site_make_the_same_bytes(packed: Path, tree: Path, tmp_path: Path) -> None:
    pack(options(tree, tmp_path / "three", workers=3), quiet)
    assert contents(tmp_path / "three") == contents(packed)
    words = ["samples_per_shard=8", "workers=1", "site=slurm/sites/local.yaml", "site.parallel=2"]
    done = program(f"source={tree}", f"out={tmp_path / 's'}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "videos: 2 job(s), at most 2 at a time" in done.stdout and "36 samples" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(packed)  # and nothing of the jobs is left in the folder
    assert (tmp_path / "s" / "00000.tar").stat().st_mode & 0o777 == (packed / "00000.tar").stat().st_mode & 0o777
    again = program(f"source={tree}", f"out={tmp_path / 's'}", *words)
    assert again.returncode == 0 and "is packed already" in again.stdout and "job(s)" not in again.stdout


def test_an_error_in_a_job_is_one_sentence_here(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    shutil.rmtree(root / "cropped_aligned" / "d4")
    done = program(f"source={root}", f"out={tmp_path / 's'}", "strict=true", "site=slurm/sites/local.yaml", "site.parallel=1", "workers=1")
    assert done.returncode == 1 and not list((tmp_path / "s").glob("*.tar"))
    assert done.stderr.splitlines() == [
        "pack_shards.py: unit d4 cannot be packed: it has no folder of face crops. Put it right, or pack with strict=false to leave it out."
    ]
    assert "without a site" in program(f"source={root}", f"out={tmp_path / 's'}", "site.parallel=1").stderr


def parts(tree: Path, out: Path, count: int) -> dict[str, list[PackPart]]:
    return dict(plan_parts(options(tree, out), count, quiet))


def test_parts_divide_the_work_and_decode_no_container_twice(
    packed: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read = tmp_path / "s", []
    real = video_module.read_media
    monkeypatch.setattr(video_module, "read_media", lambda path: [read.append(path), real(path)][1])
    steps = parts(tree, out, 3)
    assert [len(steps[name]) for name in ("videos", "shards", "end")] == [3, 3, 1]
    for call in steps["videos"]:
        assert call() == []
    made = []
    for call in steps["shards"]:
        assert call() == []
        made.append(len(list(out.glob("*.tar"))))
    assert made == [2, 4, 5] and not (out / "manifest.json").exists()
    assert steps["end"][0]() == []
    assert len(read) == len(set(read)) == 8
    assert contents(out) == contents(packed)
    assert plan_parts(options(tree, out), 3, quiet) == []  # nothing is left to do


def test_lost_parts_are_made_good_at_the_end(packed: Path, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    steps = parts(tree, out, 3)
    assert steps["videos"][0]() == []  # the second and third were lost
    said = steps["shards"][1]()
    assert "is not prepared" in said[0] and said[1]
    assert steps["end"][0]() == [] and contents(out) == contents(packed)


def test_parts_and_a_second_packing_exclude_each_other(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s"
    call = parts(tree, out, 1)["videos"][0]
    refused: list[str] = []

    def meanwhile(*_: Any) -> list[Any]:
        with pytest.raises(UserError, match="being packed by another process"):
            pack(options(tree, out), quiet)
        refused.append("yes")
        return []

    monkeypatch.setattr(part_module, "prepare_videos", meanwhile)
    assert call() == [] and refused == ["yes"]


def test_a_part_survives_pickling_and_keeps_the_umask(tree: Path, tmp_path: Path) -> None:
    import pickle

    part = plan_parts(PackOptions(source=str(tree), out=str(tmp_path / "s")), 2, quiet)[0][1][1]
    assert pickle.loads(pickle.dumps(part)) == part
    kept = os.umask(0)
    os.umask(kept)
    assert part.umask == kept


def test_what_jobs_left_goes_when_none_is_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, queue = tmp_path / "s.jobs", {"8_0": "RUNNING"}
    monkeypatch.setattr(slurm, "squeue", lambda job: queue if job == "8" else {})
    forget_steps(folder)  # there is none: nothing to do, and SLURM is not asked
    folder.mkdir(mode=0o700)
    (folder / "jobs.json").write_text('{"jobs": ["7", "8"]}')
    (folder / "log").write_text("")
    forget_steps(folder)
    assert (folder / "log").exists()
    queue.clear()
    folder.chmod(0o777)
    with pytest.raises(UserError, match="others may write"):
        forget_steps(folder)
    folder.chmod(0o700)
    forget_steps(folder)
    assert not folder.exists()
    folder.mkdir()
    (folder / "thesis.doc").write_text("")
    forget_steps(folder)  # not made by jobs
    assert (folder / "thesis.doc").exists()


@pytest.mark.slow
def test_without_waiting_the_shard_folder_ends_clean(packed: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real scripts, arrays and dependencies under a scheduler of our own at SLURM's edge."""
    fakeslurm.install(tmp_path / "bin")
    (tmp_path / "slurm").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm"))
    out, jobs = tmp_path / "s", tmp_path / "s.jobs"
    words = [f"source={tree}", f"out={out}", "samples_per_shard=8", "workers=1", "site=slurm/sites/minicluster.yaml", "wait=false"]
    done = program(*words)
    assert done.returncode == 0 and "submitted: " in done.stdout, done.stdout + done.stderr
    assert f"logs in {jobs}" in done.stdout and jobs.stat().st_mode & 0o777 == 0o700
    deadline = time.monotonic() + 240
    while fakeslurm_states(tmp_path / "slurm") & {"PENDING", "RUNNING"} and time.monotonic() < deadline:
        time.sleep(0.5)
    assert fakeslurm_states(tmp_path / "slurm") == {"COMPLETED"}
    assert contents(out) == contents(packed) and list(jobs.glob("*/end/*_log.out"))
    again = program(*words)
    assert again.returncode == 0 and "is packed already" in again.stdout
    assert not jobs.exists() and contents(out) == contents(packed)


def fakeslurm_states(folder: Path) -> set[str]:
    return {json.loads(path.read_text())["state"] for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def minicluster() -> Iterator[Path]:
    """A real SLURM; the folder its nodes share."""
    cluster = {"SLURM_MINICLUSTER_DIR": "/var/tmp/jmt-minicluster-pack", "SLURM_MINICLUSTER_PORT": "27917"}
    environment = {**os.environ, **cluster}
    command = {name: [str(ROOT / "slurm" / "minicluster" / name)] for name in ("up", "down")}
    answer = subprocess.run(command["up"], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
    assert answer.returncode == 0, answer.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{cluster['SLURM_MINICLUSTER_DIR']}/etc/slurm.conf")
        yield Path(answer.stdout.strip())
    assert subprocess.run(command["down"], env=environment, capture_output=True, timeout=600).returncode == 0


@pytest.mark.slurm
def test_a_slurm_array_makes_the_same_bytes(packed: Path, tree: Path, tmp_path: Path, minicluster: Path) -> None:
    words = ["samples_per_shard=8", "workers=1", "site=slurm/sites/minicluster.yaml", "site.time=00:10:00"]
    done = program(f"source={tree}", f"out={tmp_path / 's'}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shards: ended" in done.stdout and "2 task(s)" in done.stdout
    assert contents(tmp_path / "s") == contents(packed)
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    shutil.rmtree(root / "cropped_aligned" / "d4")
    words += [f"source={root}", f"out={tmp_path / 'o'}"]
    done = program(*words, "wait=false")
    assert done.returncode == 0 and "submitted: " in done.stdout, done.stderr
    again = program(*words)
    assert again.returncode == 1 and ("still in the queue" in again.stderr or "being packed" in again.stderr), again.stderr
    deadline = time.monotonic() + 120
    while (done.returncode != 3 or (tmp_path / "o.jobs").exists()) and time.monotonic() < deadline:  # the last job is still ending
        time.sleep(2)
        done = program(*words)
    assert done.returncode == 3 and "d4    it has no folder of face crops" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "o.jobs").exists() and not list((tmp_path / "o").glob(".*"))
