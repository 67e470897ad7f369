"""Ten epochs on 1, 2, 3 and 8 ranks, and their interruption: what is read, in which order, and what a state is good for."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jmt_dist.config import DataOptions
from jmt_dist.data.pipeline import ClipLoader
from jmt_dist.data.shards import ShardSet
from jmt_dist.errors import UserError

from .tiny import numbered, write_tiny

DATA = DataOptions(threads=1, shuffle_buffer=8)
Ident = tuple[int, ...]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """53 samples, a prime number, in unequal tars."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "shards", [20, 1, 17, 15])


def loader(shards: ShardSet, rank: int = 0, world: int = 1, **options: Any) -> ClipLoader:
    return ClipLoader(shards, rank=rank, world=world, **{"data": DATA, "batch": 3, "streams": (), "seed": 5, **options})


def ids(batch: dict[str, Tensor]) -> list[Ident]:
    return [tuple(row[:3]) for row in batch["id"].tolist()]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ten_training_epochs_lose_nothing_and_repeat_only_the_padding(shards: ShardSet, world: int) -> None:
    ranks = [loader(shards, rank, world) for rank in range(world)]
    orders, shares = [], set()
    for epoch in range(10):
        read = [[ids(batch) for batch in each.batches(epoch)] for each in ranks]
        assert {len(batches) for batches in read} == {ranks[0].steps} == {math.ceil(math.ceil(53 / world) / 3)}
        assert {len(batch) for batches in read for batch in batches} == {3}
        whole = Counter(chain.from_iterable(chain.from_iterable(batches[:-1] for batches in read)))
        assert set(whole.values()) <= {1}  # nothing twice before the last step
        for rank, batches in enumerate(read):
            mine = list(chain.from_iterable(batches))
            others = set(chain.from_iterable(chain.from_iterable(read[:rank] + read[rank + 1 :])))
            share = len(set(mine))
            shares.add(frozenset(mine))
            assert not others & set(mine) and len(set(mine[:share])) == share  # a rank repeats at its end, and its own
            assert share in (53 // world, -(-53 // world))
        everything = tuple(chain.from_iterable(chain.from_iterable(read)))
        assert set(everything) == set(numbered(53))
        orders.append(everything)
    assert len(set(orders)) == 10
    assert len(shares) > world or world == 1  # the tars are in another order, the ranks do not only pass their shares around


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ten_dense_passes_lose_and_repeat_nothing(shards: ShardSet, world: int) -> None:
    ranks = [loader(shards, rank, world, offsets=[0]) for rank in range(world)]
    for _ in range(10):
        read = Counter(ident for each in ranks for batch in each.batches() for ident in ids(batch))
        assert read == Counter(numbered(53))


def test_a_dense_pass_of_a_rank_with_an_empty_last_batch(tmp_path: Path) -> None:
    few = write_tiny(tmp_path / "shards", [4, 3])  # 7 over 2 ranks: 3 and 4, so one rank needs a second batch of 3
    sizes = [[len(batch["id"]) for batch in loader(few, rank, 2, offsets=[0]).batches()] for rank in range(2)]
    assert sorted(sizes) == [[3], [3, 1]]


def test_the_order_is_the_seed_s(shards: ShardSet) -> None:
    def order(seed: int) -> list[Ident]:
        return [ident for rank in range(2) for epoch in range(2) for batch in each[seed, rank].batches(epoch) for ident in ids(batch)]

    each = {(seed, rank): loader(shards, rank, 2, seed=seed) for seed in (5, 6) for rank in range(2)}
    first, other = order(5), order(6)
    each = {(5, rank): loader(shards, rank, 2, seed=5) for rank in range(2)}
    assert order(5) == first != other


def run(each: ClipLoader, steps: int) -> list[dict[str, Tensor]]:
    """The next steps, over the ends of epochs."""
    batches = chain.from_iterable(each.batches(epoch, each.done) for epoch in range(each.epoch, each.epoch + steps))
    return [{name: value.clone() for name, value in batch.items()} for batch in islice(batches, steps)]


def equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (7, 8)])
def test_a_restored_loader_goes_on_exactly(shards: ShardSet, rank: int, world: int) -> None:
    first = loader(shards, rank, world)
    steps = first.steps
    states = [first.state()]
    whole = []
    for _ in range(2 * steps + 1):  # every place of two epochs, their ends among them
        whole += run(first, 1)
        states.append(first.state())
    whole += run(first, steps + 2)
    for after in {0, 1, steps - 1, steps, steps + 1, 2 * steps - 1, 2 * steps, 2 * steps + 1}:
        again = loader(shards, rank, world)
        again.restore(states[after])
        assert again.state().keys() == states[after].keys() and again.state()["pipeline"] == states[after]["pipeline"]
        assert (again.epoch, again.done) == divmod(after, steps)
        assert equal(run(again, steps + 2), whole[after : after + steps + 2])


def test_a_state_survives_a_file_that_runs_no_code(shards: ShardSet, tmp_path: Path) -> None:
    first = loader(shards)
    run(first, 20)
    torch.save(first.state(), tmp_path / "state.pt")
    again = loader(shards)
    again.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert equal(run(again, 3), run(first, 3))


def test_steps_that_are_passed_over_count_as_read(shards: ShardSet) -> None:
    """With accumulation the last micro-batches of an epoch are not used; the next epoch must begin at its beginning."""
    whole = loader(shards)
    batches = run(whole, 2 * whole.steps)
    left = loader(shards)
    assert equal(list(islice(left.batches(0), 4)), batches[:4])
    assert equal(list(left.batches(1)), batches[left.steps :])
    late = loader(shards)
    assert equal(list(late.batches(0, 7)), batches[7 : late.steps])
    with pytest.raises(ValueError, match="step 3 of epoch 0 is over"):
        next(late.batches(0, 3))


CHANGES = {
    "world": ({"world": 3}, {}, "ranks 2, this job has ranks 3"),
    "rank": ({"rank": 0}, {}, "rank 1, this job has rank 0"),
    "batch": ({"batch": 4}, {}, "batch 3, this job has batch 4"),
    "buffer": ({"data": DATA.model_copy(update={"shuffle_buffer": 16})}, {}, "data.shuffle_buffer 8, this job has data.shuffle_buffer 16"),
    "fold": ({}, {"index_hash": "another"}, "fold all-53, this job has fold another"),
    "shards": ({}, {"manifest_hash": "another", "index_hash": "another"}, "shards [0-9a-f]{12}, this job has shards another"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_of_another_job_is_refused_and_nothing_is_changed(shards: ShardSet, change: str) -> None:
    options, other, words = CHANGES[change]
    first = loader(shards, 1, 2)
    run(first, 4)
    mine = loader(replace(shards, **other), **{"rank": 1, "world": 2, **options})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=words) as error:
        mine.restore(first.state())
    assert "\n" not in str(error.value) and "Resume with the same" in error.value.remedy
    assert (mine.epoch, mine.done) == (0, 0)


def test_a_state_from_before_the_shuffle_buffer_was_kept_still_restores(shards: ShardSet) -> None:
    first, again = loader(shards), loader(shards)
    run(first, 4)
    again.restore({name: value for name, value in first.state().items() if name != "buffer"})
    assert equal(run(again, 3), run(first, 3))
