"""BatchNorm modes on one rank and on two real gloo ranks, against plain BatchNorm over the whole batch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jmt_dist.config import VisualOptions
from jmt_dist.model.batchnorm import FrozenBatchNorm, SyncBatchNorm, average_buffers, prepare
from jmt_dist.model.heads import VisualModel
from tests.ranks import run_ranks

# (kind, whole batch, samples on rank 0 of 2): equal, ragged, and empty shares
LAYERS = (
    (nn.BatchNorm1d, (6, 3), 3),
    (nn.BatchNorm1d, (5, 3, 7), 4),
    (nn.BatchNorm2d, (3, 4, 5, 6), 1),
    (nn.BatchNorm3d, (4, 2, 3, 4, 5), 0),
)


def layer(kind: type[nn.Module], channels: int, **options: Any) -> nn.Module:
    torch.manual_seed(2)
    module = kind(channels, **options).double()
    if module.weight is not None:
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    return module


def data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, factor = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x * 2 + 5, factor


def step(module: nn.Module, x: Tensor, factor: Tensor) -> dict[str, Any]:
    """Two training steps of loss Σ factor · y, so that buffers move twice; everything a step leaves behind."""
    for _ in range(2):
        module.zero_grad()
        x = x.detach().requires_grad_()
        y = module(x)
        (y * factor).sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients, "buffers": dict(module.named_buffers())}


def shares(rank: int, shape: tuple[int, ...], first: int) -> slice:
    return slice(0, first) if rank == 0 else slice(first, shape[0])


def video_model() -> VisualModel:
    torch.manual_seed(6)
    return VisualModel(VisualOptions(depth=10, dropout=0.0, weights="none")).double()


def on_rank(rank: int) -> dict[str, Any]:
    """Everything that needs two ranks, in one start of the processes."""
    found: dict[str, Any] = {}
    for index, (kind, shape, first) in enumerate(LAYERS):
        module = prepare(nn.Sequential(layer(kind, shape[1])), "sync")
        x, factor = (t[shares(rank, shape, first)] for t in data(shape))
        found[f"layer{index}"] = step(module, x, factor)
    plain = prepare(nn.Sequential(layer(nn.BatchNorm1d, 3, affine=False, momentum=None)), "sync")
    found["no affine"] = step(plain, *(t[shares(rank, (6, 3), 2)] for t in data((6, 3))))
    far = prepare(nn.Sequential(nn.BatchNorm1d(3)), "sync")  # float32, mean 5e4 times the deviation
    x = far_data()[shares(rank, (64, 3), 20)]
    found["far"] = far(x).detach()
    try:
        prepare(nn.Sequential(nn.BatchNorm1d(3)), "sync")(torch.zeros(1 - rank, 3))
    except ValueError as error:
        found["one value"] = str(error)
    found["model"] = model_step(prepare(video_model(), "sync"), shares(rank, (3,), 2))
    found["averaged"], found["before"] = averaged(rank)
    return found


def far_data() -> Tensor:
    return torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 0.02 + 1000


def model_step(model: nn.Module, part: slice) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(9)
    frames, factor = torch.randn(3, 1, 3, 8, 24, 24, generator=generator).double(), torch.randn(3, 1, 2, generator=generator).double()
    _, va = model(frames[part])
    (va * factor[part]).sum().backward()
    return {"va": va.detach(), "gradients": {n: p.grad for n, p in model.named_parameters()}, "buffers": dict(model.named_buffers())}


def averaged(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = prepare(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)), "local")
    model.register_buffer("mine", torch.tensor([float(rank)]))  # no statistic of BatchNorm: stays
    torch.manual_seed(rank)
    for _ in range(rank + 1):
        model(torch.randn(3, 2, 6, 6) + rank)
    before = {name: value.clone() for name, value in model.named_buffers()}
    average_buffers(model)
    return dict(model.named_buffers()), before


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, on_rank)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance))


def compare(wanted: dict[str, Any], found: list[dict[str, Any]]) -> None:
    for key in ("y", "dx", "va"):
        if key in wanted:
            assert close(torch.cat([f[key] for f in found]), wanted[key]), key
    for name, gradient in wanted["gradients"].items():  # the engine averages over ranks: their sum is what counts
        assert close(sum(f["gradients"][name] for f in found), gradient, 1e-9), name
    for name, value in wanted["buffers"].items():
        for f in found:
            assert close(f["buffers"][name], value), name


@pytest.mark.parametrize("index", range(len(LAYERS)), ids=[f"{kind.__name__}-{first}-of-{shape[0]}" for kind, shape, first in LAYERS])
def test_sync_equals_one_rank(ranks: list[dict[str, Any]], index: int) -> None:
    kind, shape, _ = LAYERS[index]
    compare(step(nn.Sequential(layer(kind, shape[1])), *data(shape)), [rank[f"layer{index}"] for rank in ranks])


def test_sync_without_affine_and_with_cumulative_average(ranks: list[dict[str, Any]]) -> None:
    wanted = step(nn.Sequential(layer(nn.BatchNorm1d, 3, affine=False, momentum=None)), *data((6, 3)))
    compare(wanted, [rank["no affine"] for rank in ranks])
    assert int(wanted["buffers"]["0.num_batches_tracked"]) == 2


def test_sync_keeps_precision_far_from_zero(ranks: list[dict[str, Any]]) -> None:
    x = far_data().double()
    wanted = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    assert float((torch.cat([rank["far"] for rank in ranks]) - wanted).abs().max()) < 5e-3  # float32 holds 1000 to 6e-5


def test_sync_refuses_a_single_value(ranks: list[dict[str, Any]]) -> None:
    assert all("more than one value per channel over all ranks" in rank["one value"] for rank in ranks)


def test_sync_backbone_on_two_ranks_equals_one(ranks: list[dict[str, Any]]) -> None:
    compare(model_step(video_model(), slice(0, 3)), [rank["model"] for rank in ranks])


def test_average_buffers(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["averaged"] for rank in ranks)
    for name in first:
        before = [rank["before"][name] for rank in ranks]
        if name == "mine":
            assert [float(first[name]), float(second[name])] == [0.0, 1.0]
            continue
        assert torch.equal(first[name], second[name]), name
        if name.endswith("num_batches_tracked"):
            assert int(first[name]) == 2
        else:
            assert not torch.allclose(before[0], before[1]) and close(first[name], (before[0] + before[1]) / 2, 1e-6)


def test_one_process_sync_is_plain_and_averaging_does_nothing() -> None:
    x, factor = data((4, 2, 3, 4, 5))
    module = prepare(nn.Sequential(layer(nn.BatchNorm3d, 2)), "sync")
    assert isinstance(module[0], SyncBatchNorm)
    wanted, found = step(nn.Sequential(layer(nn.BatchNorm3d, 2)), x, factor), step(module, x, factor)
    assert torch.equal(wanted["y"], found["y"]) and torch.equal(wanted["dx"], found["dx"])
    average_buffers(module)
    for name, value in module.named_buffers():
        assert torch.equal(value, wanted["buffers"][name])
    module.eval()
    reference = nn.Sequential(layer(nn.BatchNorm3d, 2)).eval()
    reference.load_state_dict(module.state_dict())
    assert torch.equal(module(x), reference(x))


def test_frozen_survives_train_and_still_learns() -> None:
    model = video_model()
    with torch.no_grad():
        model(torch.randn(2, 1, 3, 8, 32, 32).double())
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.eval()
    frames = torch.randn(2, 1, 3, 8, 32, 32).double()
    wanted = model(frames)[1]
    assert prepare(model, "frozen") is model
    model.train()
    found = model(frames)[1]
    assert torch.equal(found, wanted)  # the statistics of the file, not of the batch
    found.square().sum().backward()
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm)]
    assert len(norms) == sum("running_mean" in name for name in before) and not any(module.training for module in norms)
    assert all(p.grad is not None and p.grad.any() for module in norms for p in (module.weight, module.bias))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("mode", ["frozen", "local", "sync"])
def test_modes_share_names_and_identities(mode: str) -> None:
    model = video_model()
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    prepare(model, mode)  # type: ignore[arg-type]
    assert list(model.state_dict()) == names
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert prepare(model, mode) is model  # twice changes nothing  # type: ignore[arg-type]
    assert list(model.state_dict()) == names and model.training


def test_dimensions() -> None:
    for mode in ("frozen", "sync"):
        with pytest.raises(ValueError, match="takes"):
            prepare(nn.Sequential(nn.BatchNorm1d(3)), mode)(torch.zeros(3))  # type: ignore[arg-type]
