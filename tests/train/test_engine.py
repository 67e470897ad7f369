"""The DeepSpeed engine against plain torch: precisions, ZeRO stages and optimisers, on one and two ranks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from jmt_dist.config import EngineOptions, OptimizerOptions, ScheduleOptions
from jmt_dist.errors import UserError
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


def lin(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Both targets' 1 - CCC, from Lin's definition."""
    mx, my = prediction.mean(0), target.mean(0)
    covariance = ((prediction - mx) * (target - my)).mean(0)
    return (1 - 2 * covariance / (prediction.var(0, correction=0) + target.var(0, correction=0) + (mx - my) ** 2)).sum()


def reference(optimizer: OptimizerOptions, clip: float) -> list[torch.Tensor]:
    """Plain torch in one process and float64 on the whole batch."""
    model = net().double()
    kind: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer.name]
    momentum = {"momentum": optimizer.momentum} if optimizer.name == "sgd" else {}
    steps = kind(model.parameters(), lr=optimizer.lr, weight_decay=optimizer.weight_decay, **momentum)
    for step in range(STEPS):
        inputs, target = batch(step)
        steps.zero_grad()
        lin(model(inputs.double()), target.double()).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        steps.step()
    return [parameter.detach() for parameter in model.parameters()]


@dataclass(frozen=True)
class Case:
    engine: EngineOptions
    optimizer: OptimizerOptions
    accumulation: int
    tolerance: float


def train(rank: int, case: Case) -> list[torch.Tensor]:
    import deepspeed

    from jmt_dist.train.step import take_step

    wrapped = make_engine(
        net(), engine=case.engine, optimizer=case.optimizer, schedule=ScheduleOptions(), steps=STEPS, micro_batch=12,
        accumulation=case.accumulation, device=CPU,
    )  # fmt: skip
    if case.engine.precision == "fp16":  # from the usual 2^16 the scale first comes down, and steps are passed over
        scale: Any = getattr(wrapped.optimizer, "loss_scale_config", None) or wrapped.optimizer.loss_scaler
        scale.cur_scale = 2.0**10
    begin = sum(SPLIT[:rank])
    for step in range(STEPS):
        inputs, target = (rows[begin : begin + SPLIT[rank]] for rows in batch(step))
        cuts = [5] if case.accumulation == 2 else []
        split = zip(inputs.tensor_split(cuts), target.tensor_split(cuts), strict=True)
        parts = [{"x": x, "y": y, "id": torch.zeros(len(x), 4)} for x, y in split]
        take_step(wrapped, parts, lambda k, part: (wrapped(part["x"].to(input_type(case.engine))), part["y"]), "batch", lambda *_: None)
    with deepspeed.zero.GatheredParameters(list(wrapped.module.parameters()), enabled=case.engine.zero == 3):
        found = [copy.deepcopy(parameter.detach().double()) for parameter in wrapped.module.parameters()]
    wrapped.destroy()
    return found


def all_cases(rank: int, cases: list[Case]) -> list[list[torch.Tensor]]:
    from deepspeed.accelerator import get_accelerator

    from jmt_dist.train import engine
    from jmt_dist.train.ranks import start

    start(CPU)
    # DeepSpeed asks the processor for fast half precision, and we a GPU; what torch computes of it is the same without
    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float, torch.half, torch.bfloat16]
    engine._check_precision = lambda *_: None
    return [train(rank, case) for case in cases]


SPLIT = [17, 7]  # rows of a batch on each rank
SGD = OptimizerOptions(name="sgd", lr=0.5, momentum=0.9, weight_decay=1e-3)
ADAM = OptimizerOptions(name="adam", lr=1e-2, weight_decay=1e-3)
ADAMW = OptimizerOptions(name="adamw", lr=1e-2, weight_decay=1e-2)
# differences of all weights together, relative to how far the reference has moved them in four steps; about ten times what was
# measured for fp32 (6e-7) and autocast (2.5e-3, 8 bits of mantissa in products), four times for bf16 and fp16, which hold the weights so
TOLERANCE = {"fp32": 1e-5, "autocast": 2e-2, "bf16": 5e-2, "fp16": 1e-2}
CASES = [
    Case(EngineOptions(precision=precision, zero=zero, clip=0.5), optimizer, 2, TOLERANCE[precision])  # type: ignore[arg-type]
    for precision in TOLERANCE
    for zero in (0, 1, 2, 3)
    for optimizer in (SGD, ADAM, ADAMW)
] + [Case(EngineOptions(precision="fp32", zero=zero, clip=0.0), SGD, 1, 1e-5) for zero in (0, 1, 2, 3)]


def test_every_precision_zero_stage_and_optimiser_on_two_ragged_ranks_equals_plain_torch() -> None:
    found = run_ranks(2, all_cases, CASES)
    start = [parameter.detach().double() for parameter in net().parameters()]
    for index, case in enumerate(CASES):
        wanted = reference(case.optimizer, case.engine.clip)
        moved = sum(float((a - b).abs().sum()) for a, b in zip(start, wanted, strict=True))
        for rank in range(2):
            off = sum(float((a - b).abs().sum()) for a, b in zip(found[rank][index], wanted, strict=True))
            assert off < case.tolerance * moved, f"{case} rank {rank}: {off / moved}"


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
