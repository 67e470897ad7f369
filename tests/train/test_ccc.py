"""The CCC loss against an independent float64 NumPy implementation, and over two ranks against one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from jmt_dist.train.ccc import ccc, ccc_loss, moments
from tests.ranks import run_ranks


def reference(x: np.ndarray, y: np.ndarray) -> float:
    keep = ~np.isnan(y)
    x, y = x[keep], y[keep]
    return float(2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


def sample(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 5, generator=generator)
    target = (inputs[:, :2] * 0.4 + 0.2 * torch.randn(rows, 2, generator=generator)).clamp(-1, 1)
    target[torch.rand(rows, generator=generator) < 0.2] = float("nan")
    return inputs, target


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def test_equals_independent_reference() -> None:
    prediction, target = torch.randn(200, 2) * 0.5 + 0.3, sample(200)[1]
    found = ccc(moments(prediction, target)).numpy()
    wanted = [reference(prediction[:, k].double().numpy(), target[:, k].double().numpy()) for k in range(2)]
    assert np.allclose(found, wanted, atol=1e-12)
    assert float(ccc_loss(prediction, target).value.detach()) == pytest.approx(2 - sum(wanted), abs=1e-12)


def test_gradient_equals_numerical_gradient() -> None:
    target = sample(20)[1].double()
    prediction = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: ccc_loss(p, target).value, (prediction,))


def test_unlabelled_rows_get_no_gradient() -> None:
    target = sample(30)[1]
    prediction = torch.randn(30, 2, requires_grad=True)
    ccc_loss(prediction, target).value.backward()
    assert prediction.grad is not None
    assert (prediction.grad[torch.isnan(target)] == 0).all()
    assert (prediction.grad[~torch.isnan(target)] != 0).all()


@pytest.mark.parametrize("labels", [0, 1])
def test_fewer_than_two_labels_give_zero_loss_and_gradient(labels: int) -> None:
    target = torch.full((6, 2), float("nan"))
    target[:labels] = 0.5
    prediction = torch.randn(6, 2, requires_grad=True)
    loss = ccc_loss(prediction, target)
    loss.value.backward()
    assert float(loss.value.detach()) == 0
    assert prediction.grad is not None and (prediction.grad == 0).all()
    assert loss.labels.tolist() == [labels, labels]


def test_two_constants_have_ccc_zero_and_finite_gradient() -> None:
    prediction = torch.full((9, 2), 0.25, requires_grad=True)
    loss = ccc_loss(prediction, torch.full((9, 2), 0.25))
    loss.value.backward()
    assert loss.ccc.tolist() == [0, 0]
    assert prediction.grad is not None and torch.isfinite(prediction.grad).all()


def gradients_of_rank(rank: int, split: list[int], shared: bool) -> list[torch.Tensor]:
    """Gradients of this rank's rows, averaged over ranks as DeepSpeed does; `shared` = the loss of the global batch."""
    import torch.distributed as dist

    from jmt_dist.train import ccc as module

    inputs, target = sample(64)
    begin = sum(split[:rank])
    rows = slice(begin, begin + split[rank])
    model = net()
    if not shared:
        module.world = lambda: 1  # each rank then computes the CCC of its own rows
    module.ccc_loss(model(inputs[rows]), target[rows]).value.backward()
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        found.append(parameter.grad / dist.get_world_size())
    return found


def largest_difference(found: list[torch.Tensor]) -> float:
    inputs, target = sample(64)
    model = net()
    ccc_loss(model(inputs), target).value.backward()
    return max(float((a - b.grad).abs().max()) for a, b in zip(found, model.parameters(), strict=True))


@pytest.mark.parametrize("split", [[32, 32], [45, 19], [64, 0]])
def test_two_ranks_equal_one_rank(split: list[int]) -> None:
    for found in run_ranks(2, gradients_of_rank, split, True):
        assert largest_difference(found) < 1e-6


def test_a_ccc_per_rank_is_another_objective() -> None:
    found = run_ranks(2, gradients_of_rank, [45, 19], False)[0]
    assert largest_difference(found) > 1e-3
