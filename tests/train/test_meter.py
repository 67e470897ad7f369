"""What the training loop measures of itself, and what it says a stage will need."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jmt_dist.config import AudioOptions, EngineOptions, FusionOptions, OptimizerOptions, VisualOptions
from jmt_dist.data.pipeline import clips
from jmt_dist.errors import UserError
from jmt_dist.model.batchnorm import prepare
from jmt_dist.model.heads import AudioModel, VisualModel
from jmt_dist.model.zoo import make_fusion
from jmt_dist.track import names
from jmt_dist.train.ccc import Loss
from jmt_dist.train.engine import autocast, make_optimizer
from jmt_dist.train.forecast import Forecast
from jmt_dist.train.lean import clip_before_steps
from jmt_dist.train.meter import Meter
from tests.ranks import run_ranks

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 2, 0], [4, 0, 0, 0]])


def loss(value: float, labels: float = 16) -> Loss:
    return Loss(torch.tensor(value, dtype=torch.float64), torch.zeros(2), torch.tensor([labels, 16.0], dtype=torch.float64))


@pytest.mark.parametrize("deferred", [True, False])
def test_losses_come_back_in_their_order_and_once(deferred: bool) -> None:
    meter = Meter("toy", CPU, deferred)
    for step in range(5):
        meter.add(loss(step / 7, labels=1 if step == 3 else 2), step + 1, IDS)
    assert meter.read() == [(step / 7, step != 3) for step in range(5)]
    assert meter.read() == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_the_first_such_step_and_its_samples(value: float) -> None:
    meter = Meter("toy", CPU, deferred=True)
    meter.add(loss(0.5), 7, IDS)
    meter.add(loss(value), 8, IDS[:1])
    meter.add(loss(math.nan), 9, IDS)
    with pytest.raises(UserError, match=rf"toy: the loss is {value} at step 8, samples .* \[\(3, 1, 2\)\]"):
        meter.read()


def test_only_a_cpu_reads_at_once() -> None:
    assert not Meter("toy", CPU).deferred and Meter("toy", torch.device("cuda")).deferred


def both_ways(rank: int, folder: Path) -> tuple[Any, Any, str, list[str]]:
    """A run that reads its losses at once, one that reads them late, and what is left of one whose loss becomes NaN after step 3."""
    from jmt_dist.train import stage
    from tests.train.test_stage import Net, run

    at_once = run(rank, folder / "at-once", 1, 0)
    stage.Meter = partial(Meter, deferred=True)  # type: ignore[misc]
    late = run(rank, folder / "late", 1, 0)
    forward, calls = Net.forward, [0]

    def broken(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return forward(self, x) * (math.nan if calls[0] > 4 else 1)  # the first call is the forecast's

    Net.forward = broken  # type: ignore[method-assign]
    try:
        run(rank, folder / "nan", 1, 0)
    except UserError as error:
        return at_once, late, str(error), [path.name for path in (folder / "nan").glob("checkpoints/step-*")]
    return at_once, late, "", []


def test_losses_read_late_make_the_same_run_and_nothing_is_saved_after_one_that_is_no_number(tmp_path: Path) -> None:
    at_once, late, refusal, saved = run_ranks(1, both_ways, tmp_path)[0]
    assert late["result"] == at_once["result"]
    pace = (names.WAIT, names.SPEED)
    logged = [[point for point in each["logged"] if not point[0].endswith(pace)] for each in (at_once, late)]
    assert logged[0] == logged[1] and any(name.endswith(names.LOSS) for name, _, _ in logged[0])
    assert "the loss is nan at step 4" in refusal and "the last checkpoint is untouched" in refusal
    assert saved == ["step-00000002"]  # a save is due every two steps: the one of step 4 has found the loss


def test_waiting_counts_the_loader_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = Meter("toy", CPU)

    def batches() -> Any:
        for _ in range(8):
            clock[0] += 1  # the loader's second
            yield None

    paces = []
    for step, _ in enumerate(meter.waiting(batches()), 1):
        clock[0] += 3  # the model's
        if step % 4 == 0:
            paces.append(meter.pace(step))
    assert paces[0] is None  # the first steps are slower: libraries choose their kernels
    assert paces[1] is not None and paces[1].steps_per_s == pytest.approx(1 / 4) and paces[1].data_wait == pytest.approx(1 / 4)


def kept(model: nn.Module, predict: Any, batch: dict[str, torch.Tensor], precision: str) -> int:
    """Bytes that a real forward pass leaves for the backward one."""
    held, storages = [], {}
    known = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers(), *batch.values())}

    def pack(value: torch.Tensor) -> torch.Tensor:
        held.append(value)
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), autocast(precision, CPU):
        predict(model, batch, torch.Generator())
    return sum(size for place, size in storages.items() if place not in known)


STAGES: dict[str, tuple[Any, Any, dict[str, tuple[int, ...]]]] = {
    "visual": (
        lambda: VisualModel(VisualOptions(depth=10, weights="none")),
        lambda net, batch, draw: (net(clips(batch["frames"]))[1], None),
        {"frames": (1, 64, 16, 16, 3)},
    ),
    "audio": (lambda: AudioModel(AudioOptions()), lambda net, batch, draw: (net(batch["mel"])[1], None), {"mel": (1, 8, 64, 107)}),
    "fusion": (
        lambda: make_fusion(FusionOptions()),
        lambda net, batch, draw: (net(batch["audio"], batch["visual"]), None),
        {"audio": (2, 8, 512), "visual": (2, 8, 512)},
    ),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_the_forecast_is_what_a_real_forward_pass_keeps(stage: str, precision: str) -> None:
    make, predict, shapes = STAGES[stage]
    model = make().train()
    batch = {name: torch.randn(shape) for name, shape in shapes.items()}
    need = Forecast(model, EngineOptions(precision=precision), OptimizerOptions(), 1).need(predict, batch, CPU)  # type: ignore[arg-type]
    assert need.activation_bytes == pytest.approx(kept(model, predict, batch, precision), rel=0.02)
    assert need.trained == sum(parameter.numel() for parameter in model.parameters()) and need.fixed == 0
    assert need.state_bytes == 12 * need.trained  # weight, gradient, momentum


def test_the_forecast_divides_what_zero_divides_and_runs_with_sync_batchnorm() -> None:
    make, predict, shapes = STAGES["audio"]
    batch = {name: torch.randn(shape) for name, shape in shapes.items()}
    model = prepare(make(), "sync")
    for parameter in model.head.parameters():
        parameter.requires_grad_(False)
    adam = OptimizerOptions(name="adam")
    for zero, each in ((0, 4 + 4 + 8), (1, 4 + 4 + 4), (2, 4 + 2 + 4), (3, 2 + 2 + 4)):
        need = Forecast(model, EngineOptions(precision="fp32", zero=zero), adam, ranks=2).need(predict, batch, CPU)
        assert need.state_bytes == each * need.trained + need.fixed * (2 if zero == 3 else 4)
    assert need.fixed == sum(parameter.numel() for parameter in model.head.parameters()) and need.activation_bytes > 1e6


@pytest.mark.parametrize("clip", [1e-3, 1e3])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_clipping_before_steps_is_torchs(name: str, clip: float) -> None:
    def trained(hooked: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
        optimizer = make_optimizer(list(net.parameters()), OptimizerOptions(name=name, lr=0.1))  # type: ignore[arg-type]
        if hooked:
            clip_before_steps(optimizer, list(net.parameters()), clip)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
            if not hooked:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
        return [parameter.detach() for parameter in net.parameters()]

    for mine, theirs in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
