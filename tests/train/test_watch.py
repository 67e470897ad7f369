"""Ranks that hang, fail or die, in real jobs of two: every rank ends, and says why."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jmt_dist.errors import UserError
from tests.ranks import run_ranks, start_ranks
from tests.train import test_stage


def notes(folder: Path) -> Callable[[str, bool], None]:
    """What a watch says before it ends its process, as a file of the rank."""

    def failed(sentence: str, again: bool) -> None:
        from jmt_dist.train.ranks import rank

        (folder / f"said-{rank()}.json").write_text(json.dumps([sentence, again]))

    return failed


def said(folder: Path, rank: int) -> tuple[str, bool]:
    sentence, again = json.loads((folder / f"said-{rank}.json").read_text())
    return sentence, again


def wait_for_ever() -> None:
    while True:
        time.sleep(60)


def stuck(rank: int, folder: Path) -> None:
    """A stage in which rank 1 gets no batch after its third step."""
    from jmt_dist.data.features import FeatureLoader
    from jmt_dist.train.watch import Watch

    batches = FeatureLoader.batches

    def slow(self: FeatureLoader, epoch: int = 0, done: int = 0) -> Any:
        for number, batch in enumerate(batches(self, epoch, done)):
            if rank == 1 and number == 3:
                wait_for_ever()
            yield batch

    FeatureLoader.batches = slow  # type: ignore[method-assign]
    with Watch(6, folder, notes(folder)) as watch:
        test_stage.run(rank, folder / "stage", 2, 0, watch=watch)


def test_a_rank_that_hangs_ends_the_job_with_stacks_and_one_sentence_per_rank(tmp_path: Path) -> None:
    assert start_ranks(2, str(tmp_path), stuck, tmp_path) == [1, 1]
    assert not list(tmp_path.glob("*.error"))  # no exception: each rank was ended by its watch
    sentence, again = said(tmp_path, 1)
    moved = "nothing has moved for 6 s (site.hang_seconds): toy, epoch 0, step 4, waiting for a batch"
    assert sentence.startswith(f"rank 1 of 2: {moved}") and again
    assert said(tmp_path, 0)[0].startswith(f"rank 0 of 2: ended because rank 1 hangs: {moved}; this rank was at toy, epoch 0, step 4")
    for rank, function in ((0, "all_reduce"), (1, "wait_for_ever")):
        assert function in (tmp_path / f"stacks-rank-{rank}.txt").read_text()
    assert (tmp_path / "stage" / "checkpoints" / "step-00000002").is_dir()


def slowly(rank: int, folder: Path) -> Any:
    """A stage whose validation and saves each take longer than the limit, but move on."""
    from jmt_dist.train import stage
    from jmt_dist.train.checkpoint import Checkpoints
    from jmt_dist.train.watch import Watch

    moments, publish = stage.validation_moments, Checkpoints._publish

    def patient(engine: Any, batches: Any, validate: Any, beat: Any) -> Any:
        def each() -> Any:
            for batch in batches:
                for _ in range(3):
                    time.sleep(1.6)
                    yield batch

        return moments(engine, each(), validate, beat)

    def slow(self: Checkpoints, *arguments: Any) -> None:
        if arguments[2] == 4:
            time.sleep(6)
        publish(self, *arguments)

    stage.validation_moments = patient
    Checkpoints._publish = slow  # type: ignore[method-assign]
    with Watch(4, folder, notes(folder)) as watch:
        return test_stage.run(rank, folder / "stage", 1, 5, watch=watch)


@pytest.mark.slow
def test_long_validations_and_saves_are_no_hang(tmp_path: Path) -> None:
    assert run_ranks(1, slowly, tmp_path) == [{"stopped": True}]


def holds_the_lock(rank: int, folder: Path) -> None:
    from jmt_dist.train import watch

    watch.STUCK = 1.0
    with watch.Watch(1, folder):
        re.match(r"(a+)+b", "a" * 64)  # takes years, within the interpreter lock


def test_a_rank_that_never_releases_the_interpreter_lock_is_ended_too(tmp_path: Path) -> None:
    assert start_ranks(1, str(tmp_path), holds_the_lock, tmp_path) == [1]
    assert not list(tmp_path.glob("*.error"))


def parting(rank: int, folder: Path, error: Exception, sleeps: bool) -> str:
    """Rank 1 fails while rank 0 waits for it in a collective, or is asleep."""
    import torch.distributed as dist

    from jmt_dist.train import watch

    watch.GRACE = 1.0
    with watch.Watch(600, folder, notes(folder)) as watching:
        try:
            if rank == 1:
                raise error
            if sleeps:
                wait_for_ever()
            dist.all_reduce(torch.zeros(1))
        except Exception as found:
            settled = watching.settle(found)
            (folder / f"settled-{rank}").write_text(f"{type(settled).__name__}: {settled}")
    return ""


@pytest.mark.parametrize(("error", "kind"), [(UserError("the moon is down", "Wait."), "UserError"), (OSError("cable"), "RuntimeError")])
def test_the_others_end_with_the_reason_of_the_rank_that_failed(tmp_path: Path, error: Exception, kind: str) -> None:
    run_ranks(2, parting, tmp_path, error, False)
    first, second = ((tmp_path / f"settled-{rank}").read_text() for rank in range(2))
    assert second == f"{type(error).__name__}: {error}"
    assert first.startswith(f"{kind}: rank 0 stopped because rank 1 did: ") and ("moon is down. Wait." in first or "cable" in first)


def test_a_rank_that_cannot_notice_is_ended_when_another_has_failed(tmp_path: Path) -> None:
    assert start_ranks(2, str(tmp_path), parting, tmp_path, UserError("the moon is down"), True) == [1, 0]
    sentence, again = said(tmp_path, 0)
    assert "rank 0 of 2: ended because rank 1 failed: the moon is down" in sentence and not again
    assert "wait_for_ever" in (tmp_path / "stacks-rank-0.txt").read_text()


def cut_short(rank: int, folder: Path) -> None:
    """A mapped file is cut short while it is read."""
    import numpy as np

    from jmt_dist.train.watch import Watch

    path = folder / "rows"
    path.write_bytes(bytes(1 << 20))
    mapped = np.memmap(path, np.uint8, "r")
    with Watch(600, folder, notes(folder), lambda: f"{path} has {path.stat().st_size} bytes"):
        with path.open("r+b") as file:
            file.truncate(1 << 12)
        print(int(np.asarray(mapped).sum()), file=sys.stderr)


def test_a_mapped_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    assert start_ranks(1, str(tmp_path), cut_short, tmp_path) == [1]
    sentence, again = said(tmp_path, 0)
    assert f"{tmp_path}/rows has 4096 bytes" in sentence and not again
