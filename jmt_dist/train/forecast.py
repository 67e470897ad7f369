"""What a stage will need, said before it begins: parameters, memory, steps; and its hours, once its pace is known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jmt_dist.config import EngineOptions, OptimizerOptions
from jmt_dist.model.batchnorm import SyncBatchNorm
from jmt_dist.train.engine import autocast

Batch = dict[str, Tensor]
Predict = Callable[[nn.Module, Batch, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Need:
    """Per rank: trained and other parameters; bytes of parameters, gradients and the optimiser's state; bytes of activations."""

    trained: int
    fixed: int
    state_bytes: int
    activation_bytes: int

    def line(self, micro_batch: int, steps: int) -> str:
        """For people."""
        fixed = f" and {self.fixed / 1e6:.1f} M frozen" if self.fixed else ""
        return (
            f"{self.trained / 1e6:.1f} M parameters{fixed}, {_size(self.state_bytes)} with gradients and optimiser; about "
            f"{_size(self.activation_bytes)} of activations for {micro_batch} subsequences at a time; {steps:,} steps at most"
        )


def _size(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


class Forecast:
    """Takes the shapes of a model before an engine divides it; `need` runs a batch through them without computing anything."""

    def __init__(self, model: nn.Module, engine: EngineOptions, optimizer: OptimizerOptions, ranks: int) -> None:
        self._skeleton = copy.deepcopy(model).to("meta")
        self._skeleton.train()
        for module in self._skeleton.modules():
            if isinstance(module, SyncBatchNorm):
                module.eval()  # it would ask the other ranks; what it keeps is of the same size
        self._engine, self._optimizer, self._ranks = engine, optimizer, ranks

    def need(self, predict: Predict, batch: Batch, device: torch.device) -> Need:
        """What training on batches like this one takes. The memory of libraries and of DALI is not counted."""
        parameters = list(self._skeleton.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        fixed = sum(p.numel() for p in parameters if not p.requires_grad)
        return Need(trained, fixed, self._state(trained, fixed), self._activations(predict, batch, device))

    def _state(self, trained: int, fixed: int) -> int:
        engine, ranks = self._engine, self._ranks
        half = engine.precision in ("bf16", "fp16")
        weight = gradient = 2 if half else 4
        moments = {"sgd": 4 if self._optimizer.momentum else 0}.get(self._optimizer.name, 8) + (4 if half else 0)  # and the fp32 copy
        shares = [ranks if engine.zero >= stage else 1 for stage in (3, 2, 1)]  # of weights, gradients, optimiser (ZeRO)
        each = weight / shares[0] + gradient / shares[1] + moments / shares[2]
        return round(trained * each + fixed * weight / shares[0])

    def _activations(self, predict: Predict, batch: Batch, device: torch.device) -> int:
        """Bytes that autograd keeps between forward and backward: distinct storages, less parameters and the batch."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        kept: dict[int, int] = {}
        with FakeTensorMode(allow_non_fake_inputs=True):
            values = {name: _empty(value, device) for name, value in (*self._skeleton.named_parameters(), *self._skeleton.named_buffers())}
            inputs = {name: _empty(value, device) for name, value in batch.items()}
            known = {_storage(value) for value in (*values.values(), *inputs.values())}

            def pack(value: Tensor) -> Tensor:
                if _storage(value) not in known:
                    kept[_storage(value)] = value.untyped_storage().nbytes()
                held.append(value)  # a storage that is gone could give its number to another
                return value

            held: list[Tensor] = []

            def net(*arguments: Any) -> Any:
                return torch.func.functional_call(self._skeleton, values, arguments)

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), autocast(self._engine.precision, device):
                predict(net, inputs, torch.Generator())  # type: ignore[arg-type]
        return sum(kept.values())


def _empty(value: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return made.requires_grad_(value.requires_grad)


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata
