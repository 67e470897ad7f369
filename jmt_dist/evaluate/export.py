"""A trained pipeline as one folder that says what it is (`estimator` lists it), and its networks as ONNX, proven to compute the same."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jmt_dist.data.geometry import CLIP_FRAMES, CLIPS, MEL_BINS, MEL_COLUMNS
from jmt_dist.errors import UserError
from jmt_dist.evaluate.estimator import DESCRIPTION, RECIPE, VERSION, Estimator, Source, describe_inputs, sha256
from jmt_dist.model.attention import WIDTH

OPSET = 20
TOLERANCE = 1e-4  # largest difference allowed, times the largest output where that is above 1: float32 sums in another order
LICENCE = "Trained on Aff-Wild2: its licence forbids commercial use and passing the data on; ask its owners before passing on a model."


@dataclass(frozen=True)
class Port:
    """What a network takes and gives as ONNX: its inputs' names and shapes after the batch, and its output's name."""

    inputs: Mapping[str, tuple[int, ...]]
    output: str

    def draw(self, size: int, generator: torch.Generator) -> list[Tensor]:
        """Random inputs for a batch of `size`."""
        return [torch.randn(size, *shape, generator=generator) for shape in self.inputs.values()]


FUSION = Port({"audio": (CLIPS, WIDTH), "visual": (CLIPS, WIDTH)}, "va")
AUDIO = Port({"mel": (CLIPS, MEL_BINS, MEL_COLUMNS)}, "features")


def visual_port(size: int) -> Port:
    """Clips [batch, 3, 8, size, size] → features [batch, 512]."""
    return Port({"clips": (3, CLIP_FRAMES, size, size)}, "features")


class _Positional(nn.Module):
    """A network whose inputs are tensors alone: a fusion model without its mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *values: Tensor) -> Tensor:
        """The network's output."""
        result: Tensor = self.model(*values)
        return result


def export_onnx(model: nn.Module, path: Path, port: Port = FUSION, notes: Mapping[str, str] | None = None) -> Path:
    """Write a network as ONNX with the inputs and the output of `port`, float32, any batch.

    A fusion model takes features of the frozen backbones, as the features stage stores them. `notes` become the file's
    metadata; the model itself is left on the CPU, in evaluation mode. The file appears by one rename. Raises UserError
    where onnx or onnxscript is not installed, or the model cannot be exported.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"exporting needs the package {package}", f"pip install {package}")
    import onnx

    net = _Positional(model).float().cpu().eval()
    example = tuple(port.draw(3, torch.Generator().manual_seed(0)))  # 3: 1 would be taken for a constant
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            program = torch.onnx.export(
                net,
                example,
                input_names=list(port.inputs),
                output_names=[port.output],
                dynamic_shapes=(tuple({0: batch} for _ in example),),
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


def parity(model: nn.Module, path: Path, port: Port = FUSION, batches: tuple[int, ...] = (1, 2, 17), seed: int = 0) -> float | None:
    """Largest difference between the model and its ONNX file over random inputs of several batch sizes.

    None where onnxruntime is not installed. Raises UserError above `TOLERANCE`.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    session = _session(path)
    net = model.float().cpu().eval()
    generator, worst, scale = torch.Generator().manual_seed(seed), 0.0, 1.0
    for size in batches:
        values = port.draw(size, generator)
        with torch.no_grad():
            expected = net(*values).numpy()
        got = session.run([port.output], {name: value.numpy() for name, value in zip(port.inputs, values, strict=True)})[0]
        if got.shape != expected.shape:
            raise UserError(f"{path} gives {got.shape} instead of {expected.shape}", "Report it with the recipe.")
        worst, scale = max(worst, float(np.abs(got - expected).max())), max(scale, float(np.abs(expected).max()))
    if not worst <= TOLERANCE * scale:
        raise UserError(f"{path} differs from the model by {worst:.1e}, more than {TOLERANCE * scale:.0e}", "Report it with the recipe.")
    return worst


def export_folder(source: Source, folder: Path, onnx: bool = True) -> dict[str, float | None]:
    """Write the pipeline of `source` as one folder; returns the largest difference of each ONNX file from its network.

    Loaded again and compared before it appears, by one rename. Raises UserError where the folder exists, weights are
    missing, or as `export_onnx` and `parity`.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already", "Remove it, or choose another folder.")
    estimator = Estimator(source).to("cpu")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        scratch.mkdir()
        differences = _fill(estimator, scratch, onnx)
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return differences


def _fill(estimator: Estimator, folder: Path, onnx: bool) -> dict[str, float | None]:
    from jmt_dist.recipe import dump

    source = estimator.source
    size = source.recipe.visual.size
    who = {"recipe": source.recipe.name, "fold": source.fold, "model": source.model, "seed": source.seed}
    dump(source.recipe, folder / RECIPE)
    for name, path in source.weights.items():
        shutil.copyfile(path, folder / f"{name}.safetensors")
    differences: dict[str, float | None] = {}
    if onnx:
        ports = {"visual": visual_port(size), "audio": AUDIO, "fusion": FUSION}
        networks = {"visual": estimator.visual.backbone, "audio": estimator.audio.backbone, "fusion": estimator.fusion}
        notes = {key: str(value) for key, value in who.items()}
        for name, port in ports.items():
            export_onnx(networks[name], folder / f"{name}.onnx", port, notes)
            differences[f"{name}.onnx"] = parity(networks[name], folder / f"{name}.onnx", port, (1, 2, 5))
    frame = {"end": "end frame", "middle": "fifth frame of eight"}[source.recipe.label]
    description = {
        "version": VERSION,
        "package": f"jmt-dist {importlib.metadata.version('jmt-dist')}",
        "pipeline": {**who, "size": size},
        "inputs": describe_inputs(size),
        "outputs": {"visual.onnx, audio.onnx": "features [512] of a clip", "fusion.onnx": f"valence, arousal of a clip's {frame}"},
        "metrics": source.metrics,
        "onnx_differences": differences,
        "licence": LICENCE,
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return differences


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
