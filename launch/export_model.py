"""Export a trained pipeline to one folder that says what it is, or its fusion model alone as ONNX; both are checked against PyTorch.

    python launch/export_model.py out=runs/paper fold=official to=jmt-official              weights, recipe, metrics, three ONNX files
    python launch/export_model.py out=runs/demo fold=fold-1 model=gated seed=2 to=gated.onnx

The folder needs PyTorch alone to be used (`predict_units.py out=<folder> crops=… media=…`): no DeepSpeed, DALI or MLflow.
ONNX: `visual` takes clips [batch, 3, 8, size, size] and `audio` spectrograms [batch, 8, 64, 107], both give features; `fusion`
takes features `audio` and `visual` [batch, 8, 512] and gives `va` [batch, 8, 2]. model.json says how inputs are made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from jmt_dist.config import OFFICIAL, Options
from jmt_dist.program import OK, OMISSIONS, run
from jmt_dist.recipe import build, word_layer


class ExportOptions(Options):
    """Which weights, and where to."""

    out: str = Field(description="run folder, as submit_folds.py printed it")
    to: str = Field(description="folder to write; or a name that ends in .onnx, for the fusion model alone")
    fold: str = Field(OFFICIAL, description="fold whose best weights are exported")
    model: str = Field("", description="fusion model; empty: the recipe's")
    seed: Annotated[int, Field(ge=-1)] = Field(-1, description="seed of the training; -1: the recipe's first")
    onnx: bool = Field(True, description="ONNX files in the folder too")


def main(words: list[str]) -> int:
    """Load, export, compare outputs; 3 where onnxruntime is not there to compare them."""
    options = build(ExportOptions, [word_layer(word) for word in words])
    from jmt_dist.evaluate.estimator import run_source

    source, to = run_source(Path(options.out), options.fold, options.model, options.seed), Path(options.to)
    if to.suffix == ".onnx":
        differences = _fusion(source, to)
    else:
        from jmt_dist.evaluate.export import export_folder

        print("exporting", *source.weights.values(), sep="\n  ", flush=True)
        differences = export_folder(source, to, options.onnx)
    for name, worst in differences.items():
        if worst is None:
            print(f"missing: {name} was not compared with the model: onnxruntime is not installed (pip install onnxruntime)")
        else:
            print(f"{name}: largest difference from the model: {worst:.1e}")
    print(to)
    return OMISSIONS if None in differences.values() else OK


def _fusion(source: Any, to: Path) -> dict[str, float | None]:
    from jmt_dist.evaluate.export import export_onnx, parity
    from jmt_dist.model.zoo import make_fusion
    from jmt_dist.train.weights import load_weights

    print(f"exporting {source.weights['fusion']}", flush=True)
    model = make_fusion(source.recipe.fusion, source.model)
    load_weights(model, source.weights["fusion"])
    notes = {"recipe": source.recipe.name, "fold": source.fold, "model": source.model, "seed": str(source.seed)}
    export_onnx(model, to, notes={**notes, "inputs": "features of the frozen backbones"})
    return {to.name: parity(model, to)}


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", ExportOptions)])
