"""A fusion model as an ONNX file that runs without this package, and the proof that it computes the same."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jmt_dist.data.geometry import CLIPS
from jmt_dist.errors import UserError
from jmt_dist.model.attention import WIDTH

INPUTS, OUTPUT = ("audio", "visual"), "va"
OPSET = 20
TOLERANCE = 1e-4  # largest difference allowed, times the largest output where that is above 1: float32 sums in another order


class _Unmasked(nn.Module):
    """The model as it is used on whole subsequences: two inputs, no mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
        """[B, 8, 512] × 2 → [B, 8, 2]."""
        result: Tensor = self.model(audio, visual)
        return result


def export_fusion(model: nn.Module, path: Path, notes: Mapping[str, str] | None = None) -> Path:
    """Write a fusion model as ONNX: `audio`, `visual` float32 [batch, 8, 512] → `va` float32 [batch, 8, 2], any batch.

    The inputs are features of the frozen backbones, as the features stage stores them. `notes` become the file's
    metadata; the model itself is left on the CPU, in evaluation mode. The file appears by one rename. Raises UserError
    where onnx or onnxscript is not installed, or the model cannot be exported.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"exporting needs the package {package}", f"pip install {package}")
    import onnx

    net = _Unmasked(model).float().cpu().eval()
    generator = torch.Generator().manual_seed(0)
    example = tuple(torch.randn(3, CLIPS, WIDTH, generator=generator) for _ in INPUTS)  # 3: 1 would be taken for a constant
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            program = torch.onnx.export(
                net,
                example,
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                dynamic_shapes=({0: batch}, {0: batch}),
                opset_version=OPSET,
                dynamo=True,
            )
    except Exception as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise UserError(f"{type(model).__name__} cannot be exported: {reason.strip()[:200]}", "Report it with the recipe.") from error
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {key: str(value) for key, value in (notes or {}).items()})
    onnx.checker.check_model(proto, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(proto.SerializeToString())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def parity(model: nn.Module, path: Path, batches: tuple[int, ...] = (1, 2, 17), seed: int = 0) -> float | None:
    """Largest difference between the model and its ONNX file over random features of several batch sizes.

    None where onnxruntime is not installed. Raises UserError above `TOLERANCE`.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    session = _session(path)
    net = model.float().cpu().eval()
    generator, worst, scale = torch.Generator().manual_seed(seed), 0.0, 1.0
    for size in batches:
        audio, visual = (torch.randn(size, CLIPS, WIDTH, generator=generator) for _ in INPUTS)
        with torch.no_grad():
            expected = net(audio, visual).numpy()
        got = session.run([OUTPUT], {"audio": audio.numpy(), "visual": visual.numpy()})[0]
        if got.shape != expected.shape:
            raise UserError(f"{path} gives {got.shape} instead of {expected.shape}", "Report it with the recipe.")
        worst, scale = max(worst, float(np.abs(got - expected).max())), max(scale, float(np.abs(expected).max()))
    if not worst <= TOLERANCE * scale:
        raise UserError(f"{path} differs from the model by {worst:.1e}, more than {TOLERANCE * scale:.0e}", "Report it with the recipe.")
    return worst


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress lines and deprecation warnings, which say nothing about this model."""
    names = ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
