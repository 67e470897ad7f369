"""Export a trained fusion model as ONNX, and check that it computes the same.

    python launch/export_model.py out=runs/paper fold=official to=jmt.onnx
    python launch/export_model.py out=runs/demo fold=fold-1 model=gated seed=2 to=gated.onnx

Inputs `audio` and `visual` are features of the frozen backbones, [batch, 8, 512]; output `va` is [batch, 8, 2].
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from jmt_dist.config import FUSION_MODELS, OFFICIAL, Options
from jmt_dist.errors import UsageError
from jmt_dist.program import OK, OMISSIONS, run
from jmt_dist.recipe import build, load_recipe, nearest, word_layer


class ExportOptions(Options):
    """Which weights, and where to."""

    out: str = Field(description="run folder, as submit_folds.py printed it")
    to: str = Field(description="ONNX file to write")
    fold: str = Field(OFFICIAL, description="fold whose best weights are exported")
    model: str = Field("", description="fusion model; empty: the recipe's")
    seed: Annotated[int, Field(ge=-1)] = Field(-1, description="seed of the training; -1: the recipe's first")


def main(words: list[str]) -> int:
    """Load, export, compare outputs; 3 where onnxruntime is not there to compare them."""
    options = build(ExportOptions, [word_layer(word) for word in words])
    recipe = load_recipe(Path(options.out) / "recipe.yaml")
    name = options.model or recipe.fusion.model
    if name not in FUSION_MODELS:
        raise UsageError(f"there is no fusion model `{name}`", nearest(name, FUSION_MODELS))
    seed = options.seed if options.seed >= 0 else recipe.fusion.seeds[0]
    weights = Path(options.out) / options.fold / "fusion" / f"{name}-seed{seed}" / "best.safetensors"
    print(f"exporting {weights}", flush=True)
    from jmt_dist.evaluate.export import export_fusion, parity
    from jmt_dist.model.zoo import make_fusion
    from jmt_dist.train.weights import load_weights

    model = make_fusion(recipe.fusion, name)
    load_weights(model, weights)
    notes = {"recipe": recipe.name, "fold": options.fold, "model": name, "seed": str(seed), "inputs": "features of the frozen backbones"}
    path = export_fusion(model, Path(options.to), notes)
    worst = parity(model, path)
    if worst is None:
        print("not compared with the model: onnxruntime is not installed (pip install onnxruntime)")
    else:
        print(f"largest difference from the model: {worst:.1e}")
    print(path)
    return OK if worst is not None else OMISSIONS


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", ExportOptions)])
