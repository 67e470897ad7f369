"""What the card itself reaches: copies, bf16 matrices, and the convolutions of R(2+1)D one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from gpu_setting import GIGA, TERA, Setting, rate
from torch import Tensor, nn

from jmt_dist.config import VisualOptions
from jmt_dist.model.heads import VisualModel


def ceilings(setting: Setting, found: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """Copy bandwidths in GB/s, the bf16 matrix rate and the rate of the net's convolutions in TFLOP/s."""
    options, device = setting.options, setting.device
    device_copy, host_copy = _copies(setting, options.copy_mb * 2**20)
    side = options.matrix
    x, y = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    matrix = 2 * side**3 / setting.seconds(partial(torch.matmul, x, y)) / TERA
    convolutions, flops = _convolutions(setting)
    values = {
        "device_copy_gb_s": rate(device_copy),
        "host_to_device_gb_s": rate(host_copy),
        "bf16_matrix_tflop_s": rate(matrix),
        "convolutions_tflop_s": rate(convolutions),
        "flop_per_subsequence": flops,
    }
    rows = [
        ["copy on the device", f"{device_copy:,.0f} GB/s", "read and written"],
        ["copy to the device", f"{host_copy:,.1f} GB/s", "pinned"],
        ["bf16 matrices", f"{matrix:,.1f} TFLOP/s", f"{side} x {side}"],
        ["convolutions of the net alone", f"{convolutions:,.1f} TFLOP/s", f"bf16, channels last, batch {options.batch}"],
    ]
    return values, rows


def _copies(setting: Setting, count: int) -> tuple[float, float]:
    """GB/s within the device (read and written) and from pinned memory to it."""
    host = torch.empty(count, dtype=torch.uint8, pin_memory=setting.device.type == "cuda")
    a, b = (torch.empty(count, dtype=torch.uint8, device=setting.device) for _ in range(2))
    within = 2 * count / setting.seconds(partial(b.copy_, a)) / GIGA
    return within, count / setting.seconds(partial(a.copy_, host, non_blocking=True)) / GIGA


def _convolutions(setting: Setting) -> tuple[float, float]:
    """TFLOP/s over all convolutions of R(2+1)D, each alone, forward and backward in bf16; and the FLOPs of one subsequence."""
    options, device = setting.options, setting.device
    shapes: dict[tuple[Any, ...], tuple[nn.Conv3d, torch.Size, int, bool]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv3d)
        shape = inputs[0].shape
        key = (shape, module.weight.shape, module.stride, module.padding)
        first = not shapes
        before = shapes[key][2] if key in shapes else 0
        shapes[key] = (module, shape, before + 1, first)

    model = VisualModel(VisualOptions(depth=options.depth, size=options.size, weights="none")).to(device)  # type: ignore[arg-type]
    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Conv3d)]
    with torch.no_grad():
        model(torch.zeros(1, 8, 3, 8, options.size, options.size, device=device))
    for hook in hooks:
        hook.remove()
    flops = seconds = 0.0
    for module, shape, times, first in shapes.values():
        layer = module.to(torch.bfloat16).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        x = torch.randn(options.batch * shape[0], *shape[1:], device=device, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last_3d).requires_grad_(not first)
        y = layer(x)
        gradient = torch.randn_like(y)

        def step(layer: nn.Conv3d = layer, x: Tensor = x, gradient: Tensor = gradient) -> None:
            layer(x).backward(gradient)

        per_pass = 2.0 * y.numel() * module.weight[0].numel()
        flops += times * per_pass * (2 if first else 3)  # the first needs no gradient of its input
        seconds += times * setting.seconds(step)
    return flops / seconds / TERA, flops / options.batch
