"""A DeepSpeed engine from the options of a recipe (DESIGN section 10)."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import nn

from jmt_dist.config import EngineOptions, OptimizerOptions, ScheduleOptions
from jmt_dist.errors import UserError
from jmt_dist.train.lean import clip_before_steps, is_plain, reduce_little

_PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True}},  # dynamic loss scaling
}


def make_optimizer(parameters: list[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimiser of a stage; momentum is SGD's only. Fused: one pass over the parameters, on a CPU too."""
    if options.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov, weight_decay=options.weight_decay, fused=True
        )
    kind = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True)


def rate(options: ScheduleOptions, steps: int, step: int) -> float:
    """Factor of the learning rate at `step` (from 0) of `steps`: linear warm-up, then constant, cosine or linear to 0."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if options.name == "constant":
        return 1.0
    done = min(1.0, (step - options.warmup_steps) / max(1, steps - options.warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * done)) if options.name == "cosine" else 1 - done


def _check_precision(options: EngineOptions, device: torch.device) -> None:
    if options.precision == "fp16" and device.type != "cuda":
        raise UserError("engine.precision=fp16 needs a GPU", "Use engine.precision=autocast or fp32 on this machine.")


def make_engine(
    model: nn.Module,
    *,
    engine: EngineOptions,
    optimizer: OptimizerOptions,
    schedule: ScheduleOptions,
    steps: int,
    micro_batch: int,
    accumulation: int,
    device: torch.device,
) -> Any:
    """A DeepSpeed engine around `model`, moved to `device`.

    `steps` is the number of optimiser steps the schedule spreads over; `micro_batch` is only what DeepSpeed records.
    """
    import deepspeed

    _check_precision(engine, device)
    if engine.channels_last and engine.zero:
        raise UserError("engine.channels_last needs engine.zero=0: ZeRO lays weights out flat", "Switch one of them off.")
    model = model.to(device)
    if engine.compile:
        model.compile()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = make_optimizer(parameters, optimizer)
    plain = is_plain(engine)
    if plain and engine.clip:
        clip_before_steps(optimiser, parameters, engine.clip)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(schedule, steps, step))
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if plain else engine.clip,
        "zero_optimization": {"stage": engine.zero},
        "zero_allow_untested_optimizer": True,  # DeepSpeed's list of tested optimisers lacks SGD; compared with torch's in a test
        "steps_per_print": 10**9,
        **_PRECISION[engine.precision],
    }
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimiser, lr_scheduler=scheduler, config=config)
    if engine.channels_last:  # only now: DeepSpeed's broadcast of the first weights refuses them (tried)
        for parameter in wrapped.module.parameters():
            if parameter.dim() == 5:  # `Module.to` would try those of 2-D convolutions, too
                parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
    if plain:
        reduce_little(wrapped)
    elif engine.zero == 0:
        _undo_trial_step(wrapped.optimizer)
    if engine.precision == "fp16" and engine.zero == 0:
        _scale_losses(wrapped)
    return wrapped


def _undo_trial_step(optimizer: Any) -> None:
    # DeepSpeed makes the optimiser's state by a step over zero gradients, which with Adam counts as one, and with weight decay
    # moves every weight by the learning rate (measured: weights off by 37 % of their movement after four steps)
    for copies, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for copied, parameter in zip(copies, parameters, strict=True):
            copied.data.copy_(parameter.data)
    optimizer.optimizer.state.clear()


def _scale_losses(engine: Any) -> None:
    # without ZeRO, DeepSpeed 0.19.8 divides fp16 gradients by a loss scale that its `backward` never multiplies the loss by
    # (its pull request 8393, open): steps were 65,536 times too short (measured: SGD moved 0.03 % of the way)
    unscaled = engine.backward

    def backward(loss: Any) -> Any:
        return unscaled(loss * engine.optimizer.loss_scale)

    engine.backward = backward


def input_type(options: EngineOptions) -> torch.dtype:
    """What floating inputs are cast to: bf16 and fp16 engines hold parameters of that type, autocast ones fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision, torch.float32)


def autocast(precision: str, device: torch.device) -> Any:
    """The context in which a model outside an engine computes as it would inside one."""
    kind = {"autocast": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, kind) if kind else contextlib.nullcontext()
