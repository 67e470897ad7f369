"""The moments of a model's predictions over all validation batches of this rank (DESIGN section 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jmt_dist.train.ccc import moments
from jmt_dist.train.ranks import any_rank, world

Batch = dict[str, Tensor]


@torch.no_grad()
def validation_moments(
    engine: Any, batches: Iterable[Batch], validate: Callable[[Any, Batch], tuple[Tensor, Tensor]], beat: Callable[[], None]
) -> Tensor:
    """Sums [2, 6] of `ccc.moments` over this rank's batches; `beat` is called after each. Collective under ZeRO 3.

    There every forward gathers parameters from all ranks, and ranks may have different numbers of batches, or none: a rank that
    has run out goes through the forward passes of the others with zeros that count nothing.
    """
    sums = torch.zeros(2, 6, dtype=torch.float64, device=engine.device)
    together = engine.zero_optimization_stage() == 3 and world() > 1
    for batch, counts in _in_step(batches, engine.device) if together else ((batch, True) for batch in batches):
        found = moments(*validate(engine, batch))
        if counts:
            sums += found
        beat()
    return sums


def _in_step(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Batch, bool]]:
    """(batch, whether it counts), as often as the rank with most batches has one."""
    own = iter(batches)
    batch = next(own, None)
    blank = _blank(batch, device)
    while any_rank(batch is not None, device):
        yield (batch, True) if batch is not None else (blank, False)
        batch = next(own, None)


def _blank(batch: Batch | None, device: torch.device) -> Batch:
    """One row of zeros in the form of the first batch of a rank that has one; empty where no rank has."""
    mine = {name: (tuple(value.shape[1:]), value.dtype) for name, value in batch.items()} if batch is not None else None
    forms: list[Any] = [None] * world()
    dist.all_gather_object(forms, mine)
    form: dict[str, Any] = next((form for form in forms if form is not None), {})
    return {name: torch.zeros(1, *shape, dtype=kind, device=device) for name, (shape, kind) in form.items()}
