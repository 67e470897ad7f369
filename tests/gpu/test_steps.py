"""Training steps of the three trained models on the device, against the same steps of plain torch on the CPU in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jmt_dist.config import AudioOptions, EngineOptions, FusionOptions, JmtOptions, OptimizerOptions, ScheduleOptions, VisualOptions
from tests.ranks import run_ranks

STEPS = 2
SGD = OptimizerOptions(name="sgd", lr=1e-2)
MODELS = ("visual", "audio", "fusion")


def make(name: str) -> nn.Module:
    from jmt_dist.model.batchnorm import prepare
    from jmt_dist.model.heads import AudioModel, VisualModel
    from jmt_dist.model.zoo import make_fusion

    torch.manual_seed(0)
    if name == "visual":
        return prepare(VisualModel(VisualOptions(depth=10, size=32, weights="none", dropout=0.0)), "local")
    if name == "audio":
        return prepare(AudioModel(AudioOptions(weights="none")), "local")
    return make_fusion(FusionOptions(jmt=JmtOptions(scale="sqrt", bias="log_length")))


def batch(name: str, step: int) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(step)
    shapes = {"visual": [(2, 8, 3, 8, 32, 32)], "audio": [(2, 8, 64, 107)], "fusion": [(2, 8, 512)] * 2}[name]
    return [torch.randn(shape, generator=draw) for shape in shapes], torch.rand(2, 8, 2, generator=draw) * 2 - 1


def predict(name: str, model: Any, inputs: list[Tensor]) -> Tensor:
    found = model(*inputs)
    return found if name == "fusion" else found[1]  # the backbones' models return features, too


def on_engine(rank: int, device: str, name: str, engine: EngineOptions) -> tuple[list[float], list[Tensor]]:
    """Losses and final parameters (on the CPU) of STEPS steps of the DeepSpeed engine."""
    from jmt_dist.train import ranks
    from jmt_dist.train.ccc import ccc_loss
    from jmt_dist.train.engine import input_type, make_engine
    from jmt_dist.train.weights import full_weights

    place = ranks.choose_device(device)
    ranks.start(place)
    wrapped = make_engine(
        make(name), engine=engine, optimizer=SGD, schedule=ScheduleOptions(), steps=STEPS, micro_batch=2, accumulation=1, device=place
    )
    losses = []
    for step in range(STEPS):
        inputs, target = batch(name, step)
        found = predict(name, wrapped, [value.to(place, input_type(engine)) for value in inputs])
        loss = ccc_loss(found, target.to(place)).value
        wrapped.backward(loss)
        wrapped.step()
        losses.append(loss.item())
    weights = full_weights(wrapped)
    return losses, [weights[key] for key, _ in make(name).named_parameters()]


def on_engines(rank: int, device: str, cases: list[tuple[str, EngineOptions]]) -> list[tuple[list[float], list[Tensor]]]:
    return [on_engine(rank, device, *case) for case in cases]


def plain(name: str, clip: float) -> tuple[list[float], list[Tensor]]:
    """The same by plain torch on the CPU in float32."""
    from jmt_dist.train.ccc import ccc_loss

    model, losses = make(name), []
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD.lr, momentum=SGD.momentum)
    for step in range(STEPS):
        inputs, target = batch(name, step)
        loss = ccc_loss(predict(name, model, inputs), target).value
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in model.parameters()]


def check(device: torch.device, cases: list[tuple[str, EngineOptions]], near: float, far: float) -> None:
    """Losses of the device are `near` those of plain torch, the change of the parameters is off by less than `far` of itself."""
    for (name, engine), (found, parameters) in zip(cases, run_ranks(1, on_engines, device.type, cases, device=device.type)[0], strict=True):
        wanted, expected = plain(name, engine.clip)
        start = [parameter.detach() for parameter in make(name).parameters()]
        change = torch.cat([(b - a).flatten() for a, b in zip(start, expected, strict=True)])
        error = torch.cat([(b - a).flatten() for a, b in zip(parameters, expected, strict=True)])
        off = float(error.norm() / change.norm())
        what = f"{name}, {engine.precision}, zero {engine.zero}, compile {engine.compile}, {device.type}"
        print(f"{what}: losses {found} for {wanted}, change of the parameters off by {off:.1e}")
        assert found == pytest.approx(wanted, abs=near), what
        assert off < far, what


def test_fp32_is_plain_torch_on_the_cpu(device: torch.device) -> None:
    """ZeRO 1 and 2 divide states, channels-last order moves weights, and neither changes a number."""
    cases = [
        *((name, {}) for name in MODELS),
        ("fusion", {"zero": 1}),
        ("fusion", {"zero": 2}),
        *((name, {"channels_last": True}) for name in MODELS),
    ]
    check(device, [(name, EngineOptions.model_validate({"precision": "fp32", **more})) for name, more in cases], 1e-4, 3e-2)


def test_autocast_stays_near(device: torch.device) -> None:
    """8 bits of mantissa; batch normalisation over 16 small clips makes much of them."""
    check(device, [(name, EngineOptions(precision="autocast")) for name in MODELS], 0.2, 1.0)


def test_compiled_is_the_same(device: torch.device) -> None:
    """On the CPU the fusion alone: compiling R(2+1)D takes minutes there."""
    names = ("visual", "fusion") if device.type == "cuda" else ("fusion",)
    check(device, [(name, EngineOptions(precision="fp32", compile=True)) for name in names], 1e-3, 2e-2)


@pytest.mark.gpu
def test_fp16_scales_its_loss() -> None:
    if not torch.cuda.is_available():
        pytest.fail("torch finds no CUDA GPU here: run these tests where there is one")
    cases = [(name, EngineOptions(precision="fp16")) for name in MODELS]
    for (name, _), (losses, parameters) in zip(cases, run_ranks(1, on_engines, "cuda", cases, device="cuda")[0], strict=True):
        # the first steps are passed over while the scale comes down from 2^16; no step may leave a number that is none
        assert losses[0] == pytest.approx(plain(name, 1.0)[0][0], abs=0.1)
        assert all(torch.isfinite(parameter).all() for parameter in parameters)
