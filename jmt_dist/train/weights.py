"""The best weights of a stage: gathered, written whole, checked when read (DESIGN section 10)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jmt_dist.errors import UserError
from jmt_dist.train.ranks import rank

BEST = "best.safetensors"


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The module's weights on the CPU in fp32, gathered under ZeRO 3; collective, complete on rank 0."""
    module: nn.Module = engine.module
    if engine.zero_optimization_stage() < 3:
        return {name: _plain(value) for name, value in module.state_dict().items()} if rank() == 0 else {}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: _plain(value) for name, value in module.state_dict().items()} if rank() == 0 else {}


def _plain(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous().clone()


def write_weights(weights: dict[str, torch.Tensor], path: Path) -> str:
    """Write weights as safetensors under their final name by one rename; returns their SHA-256. Raises OSError where it cannot."""
    from safetensors.torch import save

    data = save(weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # it would take the space that is lacking
        raise
    return hashlib.sha256(data).hexdigest()


def whole(folder: Path, result: dict[str, Any]) -> bool:
    """Whether the weights that a stage's result names are there, byte for byte."""
    try:
        with (folder / BEST).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == result.get("weights")
    except OSError:
        return False


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a model's weights, all keys and shapes equal.

    Raises UserError: no such file, damaged (the stage's done.json says what it must be), or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    again = f"Run the stage that writes it once more: it takes them from its last checkpoint in {path.parent / 'checkpoints'}."
    try:
        data = path.read_bytes()
    except OSError:
        raise UserError(f"there are no weights at {path}", "Run the stage that writes them first.") from None
    expected = _expected(path)
    if expected and hashlib.sha256(data).hexdigest() != expected:
        raise UserError(f"{path} is damaged: its bytes are not those that the stage wrote", again)
    try:
        model.load_state_dict(load(data), strict=True)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error})", again) from None
    except RuntimeError as error:
        raise UserError(f"{path} holds another model ({str(error).splitlines()[-1].strip()})", "Check the recipe it was made by.") from None


def _expected(path: Path) -> str:
    if path.name != BEST:
        return ""
    try:
        return str(json.loads(path.with_name("done.json").read_text())["weights"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
