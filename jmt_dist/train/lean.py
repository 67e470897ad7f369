"""What a step of the engine need not do: the fusion's 15 million parameters are read and written as seldom as possible.

Measured on one core at batch 2, where memory is what costs: DeepSpeed's all-reduce of one rank copies every gradient three times,
its clipping goes over parameters one by one, and torch's plain optimisers make a pass over memory for each operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from jmt_dist.config import EngineOptions
from jmt_dist.train.ranks import world

BUCKET = 4_000_000  # elements reduced at once: a buffer of 16 MB is used again by malloc, one of all gradients is mapped anew each step


def is_plain(options: EngineOptions) -> bool:
    """Whether the optimiser is torch's own on the model's own fp32 parameters; ZeRO, bf16 and fp16 keep copies, and clip those."""
    return options.zero == 0 and options.precision in ("fp32", "autocast")


def clip_before_steps(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip: float) -> None:
    """Before every step of `optimizer`, scale the gradients, which ranks share by then, to a norm of `clip` at most.

    The same numbers as `torch.nn.utils.clip_grad_norm_`; no host waits for a GPU, and on a CPU gradients that are short are left alone.
    """

    def scale(*_: Any) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return
        norm = nn.utils.get_total_norm(gradients)
        if norm.device.type != "cpu" or not norm <= clip:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)

    optimizer.register_step_pre_hook(scale)


def reduce_little(engine: Any) -> None:
    """Leave out the all-reduce of a single rank; let several ranks reduce in buckets."""
    if world() == 1:
        engine.enable_backward_allreduce = False
    else:
        engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=BUCKET)
