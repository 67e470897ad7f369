"""Node-local copies that take longer than a collective may: the ranks wait, and a rank that died or hangs while it copies is noticed."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jmt_dist.config import PackOptions
from jmt_dist.data.pack import pack
from tests.data.tree import write_unit
from tests.ranks import run_ranks, start_ranks
from tests.train.test_watch import notes, said

pytestmark = pytest.mark.slow  # they wait
TIMEOUT = 2.0  # seconds a collective may take here; half an hour in a job


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slow-disk")
    for k in range(6):
        write_unit(folder / "tree", f"u{k}", 40, k, "Train_Set" if k < 4 else "Validation_Set")
    pack(PackOptions(source=str(folder / "tree"), out=str(folder / "shards"), workers=1, samples_per_shard=4), say=lambda line: None)
    return folder / "shards"


def stage(rank: int, shards: Path, folder: Path, what: str) -> list[str]:
    """Stage a fold in two ranks; the first one's disk is slow, dies with its process, hangs, or it is asked to stop."""
    from jmt_dist.config import Recipe
    from jmt_dist.data import staging
    from jmt_dist.recipe import load_recipe, load_site
    from jmt_dist.train import stop
    from jmt_dist.train.plan import FoldPlan, open_parts
    from jmt_dist.train.stage import Surroundings
    from jmt_dist.train.watch import Watch

    dist.barrier()  # they meet in their own time: on a busy machine one begins seconds after the other
    dist.set_timeout(timedelta(seconds=TIMEOUT))
    copy, copied = staging._copy, []

    def slow(*arguments: Any) -> int:
        copied.append(1)
        if len(copied) == 2 and what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(copied) == 2 and what == "stops":
            stop.request("asked to end (SIGTERM)")
        time.sleep(60 if len(copied) == 2 and what == "hangs" else 0.6 * TIMEOUT)
        return copy(*arguments)

    staging._copy = slow
    recipe: Recipe = load_recipe(None, [f"data.shards={shards}"])
    site = load_site(None, [f"staging={folder}/disk"])
    with Watch(3, folder, notes(folder)) as watch:
        manifest, parts = open_parts(recipe, site, "official")
        device = torch.device("cpu")
        around = Surroundings(recipe.engine, device, lambda *_: None, lambda **_: None, False, watch)
        plan = FoldPlan(recipe, site, "official", folder, device, manifest, parts, around)
        try:
            plan.stage_in()
        except stop.Stopped as reason:
            return [str(reason)]
        finally:
            stop.clear()
        total = torch.ones(1)
        dist.all_reduce(total)  # the group is whole
        assert total.item() == 2
        return [str(tar) for part in plan.parts.values() for tar in part.tars]


def test_ranks_wait_longer_than_a_collective_may(shards: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    found = run_ranks(2, stage, shards, tmp_path, "slow")
    assert time.monotonic() - began > 2 * TIMEOUT
    assert found[0] == found[1] and len(found[0]) >= 4
    assert all(Path(tar).is_file() and Path(tar).is_relative_to(tmp_path / "disk") for tar in found[0])


@pytest.mark.parametrize("what", ["dies", "hangs"])
def test_a_rank_that_copies_nothing_more_is_noticed(shards: Path, tmp_path: Path, what: str) -> None:
    codes = start_ranks(2, str(tmp_path), stage, shards, tmp_path, what)
    assert codes == [-9 if what == "dies" else 1, 1]
    sentence, again = said(tmp_path, 1)
    assert again and f"copying shards to {tmp_path}/disk/jmt-" in sentence and "nothing has moved for 3 s" in sentence
    assert what == "hangs" or "waiting for rank 0" in sentence


def test_a_stop_while_copying_is_agreed_and_what_was_copied_stays(shards: Path, tmp_path: Path) -> None:
    assert run_ranks(2, stage, shards, tmp_path, "stops") == [["asked to end (SIGTERM)"], ["another rank was asked to stop"]]
    disk = next((tmp_path / "disk").iterdir())
    assert len(list(disk.glob("*.tar"))) >= 1 and not list(disk.glob(".*.tar.[0-9]*"))  # no half of one
