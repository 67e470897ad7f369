"""Accumulation gives the loss and the step of the whole batch; validation goes on together where ranks have unlike shares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from jmt_dist.config import EngineOptions, OptimizerOptions, ScheduleOptions
from jmt_dist.train.engine import make_engine
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ROWS, FEATURES = 24, 6


def net(plain: bool) -> nn.Module:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.Tanh()] if plain else [nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.4)]
    return nn.Sequential(nn.Linear(FEATURES, 16), *middle, nn.Linear(16, 2))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROWS, FEATURES, generator=generator)
    target = (inputs[:, :2] * 0.5).clamp(-1, 1)
    target[3, 0] = target[20, 1] = float("nan")
    return inputs, target


def engine(model: nn.Module, accumulation: int, zero: int = 0) -> Any:
    from jmt_dist.train.ranks import start

    start(CPU)
    return make_engine(
        model, engine=EngineOptions(precision="fp32", zero=zero, clip=0.0), optimizer=OptimizerOptions(lr=0.3, momentum=0.0),
        schedule=ScheduleOptions(), steps=5, micro_batch=4, accumulation=accumulation, device=CPU,
    )  # fmt: skip


def step(rank: int, world: int, parts: int, plain: bool, over: str) -> dict[str, Any]:
    """One step over this rank's rows in `parts` unequal micro-batches: loss, weights and buffers after it, and the next random number."""
    from jmt_dist.train.step import take_step

    wrapped = engine(net(plain), parts)
    inputs, target = (rows[rank::world] for rows in data())
    cuts = [2 + 3 * k for k in range(parts - 1)]
    split = zip(inputs.tensor_split(cuts), target.tensor_split(cuts), strict=True)
    batches = [{"x": x, "y": y, "id": torch.full((len(x), 4), k)} for k, (x, y) in enumerate(split)]
    torch.manual_seed(7)
    seen: list[tuple[float, int, int]] = []
    take_step(
        wrapped, batches, lambda k, part: (wrapped(part["x"]), part["y"]), over,  # type: ignore[arg-type]
        lambda loss, ids: seen.append((float(loss.value), int(loss.labels.min()), len(ids))),
    )  # fmt: skip
    state = {name: value.clone() for name, value in wrapped.module.state_dict().items()}
    return {"seen": seen, "state": state, "next": torch.rand(3)}


def steps(rank: int, world: int, *cases: tuple[int, bool, str]) -> list[dict[str, Any]]:
    return [step(rank, world, *case) for case in cases]


@pytest.mark.parametrize("world", [1, 2])
def test_accumulated_micro_batches_take_the_step_of_one_batch(world: int) -> None:
    one, three, each = run_ranks(world, steps, world, (1, True, "batch"), (3, True, "batch"), (3, True, "micro_batch"))[0]
    [(loss, labels, rows)], [again] = one["seen"], three["seen"]
    assert again == (pytest.approx(loss, abs=1e-6), labels, rows) and (labels, rows) == (ROWS - 1, ROWS // world)
    for name, value in one["state"].items():
        torch.testing.assert_close(three["state"][name], value, atol=1e-6, rtol=0)
    # the mean of the micro-batches' losses is stated to be an approximation: it is another number, and another step
    assert abs(sum(value for value, *_ in each["seen"]) / 3 - loss) > 1e-2 and sum(rows for *_, rows in each["seen"]) == ROWS // world
    assert max(float((each["state"][name] - value).abs().max()) for name, value in one["state"].items()) > 1e-3


def test_dropout_and_running_statistics_are_those_of_a_single_pass() -> None:
    found = run_ranks(1, steps, 1, (3, False, "batch"))[0][0]
    model = net(plain=False)
    inputs, target = data()
    torch.manual_seed(7)
    prediction = torch.cat([model(part) for part in inputs.tensor_split([2, 5])]).double()  # plain torch, all graphs kept
    loss: Any = 0.0
    for k in range(2):
        valid = ~target[:, k].isnan()
        x, y = prediction[valid, k], target[valid, k].double()
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        loss = loss + 1 - 2 * covariance / (x.var(correction=0) + y.var(correction=0) + (x.mean() - y.mean()) ** 2)
    loss.backward()
    wanted = copy.deepcopy(model.state_dict())
    wanted |= {name: value.detach() - 0.3 * value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert found["seen"][0][0] == pytest.approx(float(loss.detach()), abs=1e-6)
    for name, value in wanted.items():
        torch.testing.assert_close(found["state"][name], value, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["next"], torch.rand(3), atol=0, rtol=0)


def narrow(rank: int, modes: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each mode of BatchNorm: a bf16 engine's prediction in training, and the running means after a step."""
    from jmt_dist.model.batchnorm import prepare
    from jmt_dist.train.ranks import start
    from jmt_dist.train.step import take_step

    start(CPU)
    found = []
    for mode in modes:
        model = prepare(net(plain=False)[:3], mode)  # type: ignore[index, arg-type]
        wrapped = make_engine(
            nn.Sequential(model, nn.Linear(16, 2)), engine=EngineOptions(precision="bf16"), optimizer=OptimizerOptions(lr=0.3),
            schedule=ScheduleOptions(), steps=1, micro_batch=ROWS, accumulation=1, device=CPU,
        )  # fmt: skip
        inputs, target = data()
        hidden = wrapped.module[0](inputs.bfloat16()).detach()
        batch = {"x": inputs.bfloat16(), "y": target, "id": torch.zeros(ROWS, 4)}
        take_step(wrapped, [batch], lambda k, part, net=wrapped: (net(part["x"]), part["y"]), "batch", lambda *_: None)  # type: ignore[misc]
        assert all(parameter.isfinite().all() for parameter in wrapped.module.parameters())
        found.append((hidden.float(), dict(model.named_buffers())["1.running_mean"].clone()))
    return found


def test_batchnorm_trains_in_a_bf16_engine_which_leaves_its_statistics_in_float32() -> None:
    modes = ["frozen", "local", "sync"]
    inputs, _ = data()
    for mode, (hidden, running) in zip(modes, run_ranks(1, narrow, modes)[0], strict=True):
        model = net(plain=False)[:3].train(mode != "frozen")  # type: ignore[index]
        torch.testing.assert_close(hidden, model(inputs).detach(), atol=3e-2, rtol=0)  # 8 bits of mantissa
        model(inputs)
        assert running.dtype == torch.float32
        torch.testing.assert_close(running, model[1].running_mean, atol=5e-3, rtol=0)


def validation(rank: int, counts: list[int]) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
    """Under ZeRO 3, where every forward is collective, this rank has `counts[rank]` batches."""
    from jmt_dist.train.ranks import sum_over_ranks
    from jmt_dist.train.validation import validation_moments
    from jmt_dist.train.weights import full_weights

    wrapped = engine(net(plain=True), 1, zero=3)
    wrapped.eval()
    inputs, target = data()
    first = sum(counts[:rank])
    mine = [slice(4 * k, 4 * k + 4) for k in range(first, first + counts[rank])]
    beats: list[int] = []
    sums = validation_moments(
        wrapped, ({"x": inputs[rows], "y": target[rows]} for rows in mine), lambda net, part: (net(part["x"]), part["y"]),
        lambda: beats.append(1),
    )  # fmt: skip
    return sum_over_ranks(sums), len(beats), full_weights(wrapped)


@pytest.mark.parametrize("counts", [[5, 1], [0, 6]])
def test_zero_3_validates_ragged_shares_together_and_gathers_its_weights(counts: list[int]) -> None:
    from jmt_dist.evaluate.metric import ccc

    (sums, beats, weights), (_, other, none) = run_ranks(2, validation, counts)
    assert beats == other == max(counts) and none == {}
    model = net(plain=True)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    inputs, target = data()
    with torch.no_grad():
        prediction = model(inputs)
    for k in range(2):
        n, x, y, xx, yy, xy = sums[k].tolist()
        valid = ~target[:, k].isnan()
        assert n == int(valid.sum())
        mx, my = x / n, y / n
        found = 2 * (xy / n - mx * my) / (xx / n - mx * mx + yy / n - my * my + (mx - my) ** 2)
        assert found == pytest.approx(float(ccc(prediction[valid, k].numpy(), target[valid, k].numpy())), abs=1e-6)
