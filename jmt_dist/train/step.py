"""One optimiser step over its micro-batches, with the CCC of all of them together (DESIGN sections 9 and 10).

A CCC is not a mean over rows: the mean of micro-batches' CCCs is another objective than the CCC of the batch. So with
accumulation the exact loss takes two forward passes: one without a graph gives the batch's moments, and in the second each
micro-batch takes its share of the gradient of the whole batch's loss, with the same dropout and without counting twice in
BatchNorm's running statistics. The price is a forward pass, and that all micro-batches' inputs are held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from jmt_dist.train.ccc import Loss, ccc_loss, loss_of_sums, moments
from jmt_dist.train.ranks import sum_over_ranks, world

Batch = dict[str, Tensor]
Predict = Callable[[int, Batch], tuple[Tensor, Tensor]]
Seen = Callable[[Loss, Tensor], None]


def take_step(engine: Any, batches: Sequence[Batch], predict: Predict, over: Literal["batch", "micro_batch"], seen: Seen) -> None:
    """Forward, backward and one optimiser step over the micro-batches of an accumulation. Collective.

    `predict(k, batch)` gives prediction and target [..., 2] of micro-batch k; `seen(loss, ids)` is told every loss before its
    gradient is taken, and the samples [B, 4] it was made of. `over="batch"` is the loss of all micro-batches and ranks together;
    `"micro_batch"` the mean of the micro-batches' losses, which approximates it.
    """
    if over == "batch" and len(batches) > 1:
        _whole(engine, batches, predict, seen)
        return
    for k, batch in enumerate(batches):
        loss = ccc_loss(*predict(k, batch))
        seen(loss, batch["id"])
        engine.backward(loss.value)
        engine.step()


def _whole(engine: Any, batches: Sequence[Batch], predict: Predict, seen: Seen) -> None:
    module, device = engine.module, engine.device
    random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    buffers = [buffer.clone() for buffer in module.buffers()]
    with torch.no_grad():
        own = [moments(*predict(k, batch)) for k, batch in enumerate(batches)]
        for buffer, value in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(value)
    torch.set_rng_state(random[0])
    if random[1] is not None:
        torch.cuda.set_rng_state(random[1], device)
    total = sum_over_ranks(torch.stack(own).sum(dim=0))
    seen(loss_of_sums(total), torch.cat([batch["id"] for batch in batches]))
    for k, batch in enumerate(batches):
        share = moments(*predict(k, batch))
        part = loss_of_sums(total + share - share.detach()).value
        # DeepSpeed divides by the number of micro-batches and takes the mean over ranks; these parts are to be summed
        engine.backward(part * (len(batches) * world()))
        engine.step()
