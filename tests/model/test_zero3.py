"""JMT under ZeRO 3, which holds a rank's part of each weight and gathers a weight when its own module runs.

Several weights are used by a module that does not own them: the shared cross-attentions and the last token of the self-attention head.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jmt_dist.config import EngineOptions, JmtOptions, OptimizerOptions, ScheduleOptions
from jmt_dist.model.fusion import JMT
from jmt_dist.train.engine import make_engine
from tests.model.test_fusion import PRESETS
from tests.ranks import run_ranks

CPU = torch.device("cpu")
STEPS = 2


def trained(rank: int, options: JmtOptions, zero: int) -> tuple[list[float], list[torch.Tensor]]:
    """Losses, and the first row of every parameter after two steps."""
    import deepspeed

    torch.manual_seed(0)
    engine = make_engine(
        JMT(options), engine=EngineOptions(precision="fp32", zero=zero), optimizer=OptimizerOptions(name="sgd", lr=0.05),  # type: ignore[arg-type]
        schedule=ScheduleOptions(), steps=STEPS, micro_batch=2, accumulation=1, device=CPU,
    )  # fmt: skip
    losses = []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(10 * step + rank)
        audio, visual, target = (torch.randn(2, 8, width, generator=draw) for width in (512, 512, 2))
        loss = (engine(audio, visual) - target).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=zero == 3):
        found = [parameter.detach().flatten()[:512].clone() for parameter in engine.module.parameters()]
    engine.destroy()
    return losses, found


def both(rank: int, options: JmtOptions) -> tuple[Any, Any]:
    from jmt_dist.train.ranks import start

    start(CPU)
    return trained(rank, options, 0), trained(rank, options, 3)


@pytest.mark.slow
def test_two_ranks_train_the_same_weights_as_without_it() -> None:
    for (losses, plain), (losses3, whole) in run_ranks(2, both, PRESETS["reference"]):
        assert losses3 == pytest.approx(losses, rel=1e-5) and losses[0] != losses[1]
        for a, b in zip(plain, whole, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
