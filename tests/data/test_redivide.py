"""The rest of an interrupted epoch on another number of ranks: every sample not yet had, once, then whole epochs."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from jmt_dist.data.pipeline import ClipLoader
from jmt_dist.data.shards import ShardSet
from jmt_dist.data.tars import parse_index
from jmt_dist.errors import UserError

from .test_epochs import Ident, equal, ids, loader, run
from .tiny import numbered, write_tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "shards", [20, 1, 17, 15])


def job(shards: ShardSet, world: int, batch: int, **options: Any) -> list[ClipLoader]:
    return [loader(shards, rank, world, batch=batch, **options) for rank in range(world)]


def interrupted(shards: ShardSet, world: int, batch: int, steps: int) -> tuple[list[dict[str, Any]], set[Ident]]:
    """The states of a job's ranks after `steps` steps in all, and what they had of their last epoch."""
    ranks = job(shards, world, batch)
    done = steps % ranks[0].steps
    had = [ident for each in ranks for read in run(each, steps)[steps - done :] for ident in ids(read)]
    assert len(had) == len(set(had)) == done * world * batch  # the padding comes in the last step only
    return [each.state() for each in ranks], set(had)


def rest_of_epoch(ranks: list[ClipLoader]) -> Counter[Ident]:
    """What the ranks read up to the end of their epoch, less the padding; equal steps and no sample on two ranks."""
    read = [[ids(batch) for batch in each.batches(each.epoch, each.done)] for each in ranks]
    assert len({len(batches) for batches in read}) == 1
    before_last = Counter(chain.from_iterable(chain.from_iterable(batches[:-1] for batches in read)))
    assert set(before_last.values()) <= {1}
    return Counter(chain.from_iterable(set(chain.from_iterable(batches)) for batches in read))


@pytest.mark.parametrize(
    ("world", "batch", "steps", "new_world", "new_batch"),
    [
        (1, 6, 4, 2, 3),  # 29 left
        (2, 3, 4, 1, 6),
        (2, 3, 13, 3, 2),  # in the second epoch
        (3, 2, 1, 8, 1),  # nearly all is left: 47 over 8
        (8, 1, 6, 3, 3),  # 5 left, ranks x batch is another
        (8, 2, 2, 1, 16),
        (3, 4, 0, 2, 6),  # nothing read yet
        (3, 4, 5, 2, 6),  # right at the end of the first epoch
        (2, 6, 3, 2, 6),  # the same job again
    ],
)
def test_the_rest_is_divided_and_whole_epochs_follow(
    shards: ShardSet, world: int, batch: int, steps: int, new_world: int, new_batch: int
) -> None:
    states, had = interrupted(shards, world, batch, steps)
    ranks = job(shards, new_world, new_batch)
    for each in ranks:
        each.redivide(states[::-1])
    epoch, done = divmod(steps, job(shards, world, batch)[0].steps)
    assert {each.epoch for each in ranks} == {epoch}
    if world * batch == new_world * new_batch:
        assert {each.done for each in ranks} == {done}
    assert rest_of_epoch(ranks) == Counter(set(numbered(53)) - had)
    for following in (epoch + 1, epoch + 2):
        assert {(each.epoch, each.done) for each in ranks} == {(following, 0)}
        assert rest_of_epoch(ranks) == Counter(numbered(53))


def test_fewer_samples_than_ranks_are_repeated_so_that_no_rank_waits_alone(shards: ShardSet) -> None:
    states, had = interrupted(shards, 1, 1, 50)
    ranks = job(shards, 8, 2)
    for each in ranks:
        each.redivide(states)
        assert each.steps - each.done == 1
    read = rest_of_epoch(ranks)
    assert set(read) == set(numbered(53)) - had and sorted(read.values()) == [2, 3, 3]
    assert rest_of_epoch(ranks) == Counter(numbered(53))


def test_every_interruption_of_a_re_divided_epoch_goes_on(shards: ShardSet) -> None:
    """2 ranks, then 3, restored there in mid-rest, then 1: together one epoch, and orders that do not come again."""
    states, first = interrupted(shards, 2, 3, 12)
    three = job(shards, 3, 2)
    for each in three:
        each.redivide(states)
    second = {ident for each in three for read in run(each, 2) for ident in ids(read)}
    states = [each.state() for each in three]
    again = job(shards, 3, 2)
    for each, state in zip(again, states, strict=True):
        each.restore(state)
    for each, other in zip(again, three, strict=True):
        assert equal(run(each, 12), run(other, 12))  # over the end of the rest, into the next epoch
    one = job(shards, 1, 6)
    one[0].redivide(states)
    third = set(rest_of_epoch(one))
    assert not first & second and not (first | second) & third and first | second | third == set(numbered(53))
    orders = [tuple(ident for read in one[0].batches(epoch) for ident in ids(read)) for epoch in range(2, 5)]
    assert len({*orders, tuple(ident for read in loader(shards, batch=6).batches(0) for ident in ids(read))}) == 4


def test_a_state_at_the_end_of_a_rest_restores_to_the_next_epoch(shards: ShardSet) -> None:
    states, _ = interrupted(shards, 3, 2, 7)
    first, again = loader(shards, 1, 2), loader(shards, 1, 2)
    first.redivide(states)
    run(first, first.steps - first.done)
    state = first.state()
    again.restore(state)
    assert (again.epoch, again.done) == (1, 0) and len(state["seen"]) == len(state["before"]) == 0
    assert equal(run(again, 4), run(first, 4))


def test_ranks_and_epochs_draw_their_own_offsets(shards: ShardSet) -> None:
    states, _ = interrupted(shards, 3, 2, 4)
    drawn = []
    for each in job(shards, 2, 3):
        each.redivide(states)
        offsets = [q for read in run(each, each.steps - each.done + 5) for q in read["q"].tolist()]
        drawn += [tuple(offsets[:15]), tuple(offsets[-15:])]
    drawn.append(tuple(q for read in run(loader(shards), 5) for q in read["q"].tolist()))
    assert {len(offsets) for offsets in drawn} == {15} and len(set(drawn)) == 5


def test_the_temporary_indexes_live_as_long_as_the_rest(shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    states, _ = interrupted(shards, 1, 6, 5)
    each = loader(shards)
    each.redivide(states)
    run(each, 1)
    indexes = list(tmp_path.glob("jmt-rest-*/*.idx"))
    assert sum(len(parse_index(path.read_text())) for path in indexes) == 53 - 30
    assert sorted(path.name for path in shards.tars[0].parent.iterdir()) == sorted(
        [*(path.name for path in (*shards.tars, *shards.indexes)), "manifest.json"]
    )
    run(each, each.steps - each.done)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda states: states[:2], r"of ranks \[0, 1\] of 3 ranks, not one of each"),
        (lambda states: [states[0], states[0], states[2]], r"of ranks \[0, 0, 2\] of 3 ranks"),
        (lambda states: [], "of no ranks"),
        (lambda states: [*states[:2], {**states[2], "done": 3}], "differ in done"),
        (lambda states: [*states[:2], {**states[2], "world": 4}], "of 3 and 4 ranks"),
        (lambda states: [*states[:2], {**states[2], "index_hash": "another"}], "fold another, this job has fold all-53"),
        (lambda states: [{**states[0], "manifest_hash": "another"}, *states[1:]], "shards another, this job has shards"),
    ],
    ids=["missing", "twice", "none", "steps", "worlds", "fold", "shards"],
)
def test_states_that_do_not_belong_together_are_refused(shards: ShardSet, spoil: Any, words: str) -> None:
    states, _ = interrupted(shards, 3, 2, 2)
    each = loader(shards)
    with pytest.raises(UserError, match=words) as error:
        each.redivide(spoil(states))
    assert "\n" not in str(error.value)
    assert (each.epoch, each.done) == (0, 0) and len(run(each, 1)[0]["id"]) == 3


def test_states_keep_their_samples_through_a_file(shards: ShardSet, tmp_path: Path) -> None:
    states, had = interrupted(shards, 2, 3, 3)
    torch.save(states, tmp_path / "states.pt")
    each = loader(shards)
    each.redivide(torch.load(tmp_path / "states.pt", weights_only=True))
    assert set(rest_of_epoch([each])) == set(numbered(53)) - had
