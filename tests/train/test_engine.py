"""The DeepSpeed engine against plain torch: precisions, ZeRO stages and optimisers, on one and two ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from jmt_dist.config import EngineOptions, OptimizerOptions, ScheduleOptions
from jmt_dist.errors import UserError
from jmt_dist.train.ccc import ccc_loss
from jmt_dist.train.division import micro_batch, usable_ranks
from jmt_dist.train.engine import input_type, make_engine, make_optimizer, rate
from tests.ranks import run_ranks

STEPS = 4
CPU = torch.device("cpu")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(24, 6, generator=generator)
    return inputs, (inputs[:, :2] * 0.5).clamp(-1, 1)


def reference(optimizer: OptimizerOptions, clip: float) -> list[torch.Tensor]:
    """Plain torch in one process and float64 on the whole batch."""
    model = net().double()
    steps = make_optimizer(list(model.parameters()), optimizer)
    for step in range(STEPS):
        inputs, target = batch(step)
        steps.zero_grad()
        ccc_loss(model(inputs.double()), target.double()).value.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        steps.step()
    return [parameter.detach() for parameter in model.parameters()]


def train(rank: int, engine: EngineOptions, optimizer: OptimizerOptions, split: list[int]) -> list[torch.Tensor]:
    import deepspeed

    from jmt_dist.train.ranks import start

    start(CPU)
    wrapped = make_engine(
        net(), engine=engine, optimizer=optimizer, schedule=ScheduleOptions(), steps=STEPS, micro_batch=12, accumulation=1, device=CPU
    )
    begin = sum(split[:rank])
    for step in range(STEPS):
        inputs, target = batch(step)
        rows = slice(begin, begin + split[rank])
        wrapped.backward(ccc_loss(wrapped(inputs[rows].to(input_type(engine))), target[rows]).value)
        wrapped.step()
    with deepspeed.zero.GatheredParameters(list(wrapped.module.parameters()), enabled=engine.zero == 3):
        return [copy.deepcopy(parameter.detach().double()) for parameter in wrapped.module.parameters()]


def all_cases(rank: int, cases: list[tuple[EngineOptions, OptimizerOptions]], split: list[int]) -> list[list[torch.Tensor]]:
    return [train(rank, engine, optimizer, split) for engine, optimizer in cases]


SGD = OptimizerOptions(name="sgd", lr=0.5, momentum=0.9, weight_decay=1e-3)
ADAMW = OptimizerOptions(name="adamw", lr=1e-2)
# fp32 equals the float64 reference up to rounding; bf16 computes with 8 bits of mantissa
CASES = [
    (EngineOptions(precision=precision, zero=zero, clip=clip), optimizer, 2e-5 if precision == "fp32" else 6e-2)
    for precision, clip in (("fp32", 0.0), ("fp32", 0.5), ("autocast", 0.5), ("bf16", 0.5))
    for zero in (0, 1, 2, 3)
    for optimizer in (SGD, ADAMW)
]


def test_every_engine_on_two_ragged_ranks_equals_plain_torch() -> None:
    cases = [(engine, optimizer) for engine, optimizer, _ in CASES]
    found = run_ranks(2, all_cases, cases, [17, 7])
    for index, (engine, optimizer, tolerance) in enumerate(CASES):
        wanted = reference(optimizer, engine.clip)
        for rank in range(2):
            worst = max(float((a - b).abs().max()) for a, b in zip(found[rank][index], wanted, strict=True))
            assert worst < tolerance, f"{engine} {optimizer} rank {rank}: {worst}"


def test_fp16_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        make_engine(
            net(), engine=EngineOptions(precision="fp16"), optimizer=SGD, schedule=ScheduleOptions(), steps=1, micro_batch=1,
            accumulation=1, device=CPU,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (ScheduleOptions(), {0: 1, 5: 1, 9: 1}),
        (ScheduleOptions(warmup_steps=4), {0: 0.25, 3: 1, 4: 1}),
        (ScheduleOptions(name="linear", warmup_steps=2), {0: 0.5, 1: 1, 2: 1, 6: 0.5, 10: 0}),
        (ScheduleOptions(name="cosine"), {0: 1, 5: 0.5, 10: 0}),
    ],
)
def test_learning_rate(options: ScheduleOptions, wanted: dict[int, float]) -> None:
    for step, factor in wanted.items():
        assert rate(options, 10, step) == pytest.approx(factor)


@pytest.mark.parametrize(("batch_size", "world", "accumulation", "wanted"), [(8, 2, 1, 4), (8, 2, 4, 1), (1, 1, 1, 1)])
def test_division_of_a_batch(batch_size: int, world: int, accumulation: int, wanted: int) -> None:
    assert micro_batch("visual", batch_size, world, accumulation) == wanted


@pytest.mark.parametrize(
    ("batch_size", "world", "accumulation", "words"), [(8, 3, 1, "2 ranks"), (2, 8, 1, "2 ranks"), (7, 6, 1, "1 rank")]
)
def test_an_indivisible_batch_names_the_largest_number_of_ranks(batch_size: int, world: int, accumulation: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        micro_batch("visual", batch_size, world, accumulation)
    best = usable_ranks(batch_size, world, accumulation)
    assert all(batch_size % ranks for ranks in range(best + 1, world + 1))


def test_optimisers_are_torchs_own() -> None:
    kinds: list[Any] = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW]
    for name, kind in zip(("sgd", "adam", "adamw"), kinds, strict=True):
        made = make_optimizer(list(net().parameters()), OptimizerOptions(name=name, lr=0.1))  # type: ignore[arg-type]
        assert type(made) is kind
