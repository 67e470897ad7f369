"""A trained pipeline in one piece, frames and sound in, valence and arousal out: from a run folder or an exported one.

Needs PyTorch alone: no DeepSpeed, DALI or MLflow. An exported folder holds:

    model.json                                              what it is, what it takes, how it scored, sha256 of the other files
    recipe.yaml                                             every knob of its training
    visual.safetensors audio.safetensors fusion.safetensors
    visual.onnx audio.onnx fusion.onnx                      the same networks for other runtimes
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from jmt_dist.config import FUSION_MODELS, OFFICIAL, Recipe
from jmt_dist.data import geometry, sound
from jmt_dist.data.geometry import CLIP_FRAMES, CLIPS, OFFSETS, SIZE, SUBSEQUENCE
from jmt_dist.errors import UsageError, UserError
from jmt_dist.evaluate.material import Material
from jmt_dist.evaluate.predict import UnitRows, dense
from jmt_dist.model.heads import AudioModel, VisualModel
from jmt_dist.model.weights import read_state
from jmt_dist.model.zoo import make_fusion
from jmt_dist.recipe import load_recipe, nearest
from jmt_dist.track.facts import flatten
from jmt_dist.track.spool import read_params

DESCRIPTION, RECIPE = "model.json", "recipe.yaml"
VERSION = 1
PARTS = ("visual", "audio", "fusion")
# what networks, their inputs and their outputs are made by, besides all of fusion.jmt
SHAPED = ("label", "visual.backbone", "visual.depth", "visual.size", "visual.pooling", "audio.backbone", "audio.gru", "features.dtype")


@dataclass(frozen=True)
class Source:
    """Where the weights of a pipeline lie, and whose they are. `metrics`: those of the fold, where it was evaluated."""

    recipe: Recipe
    fold: str
    model: str
    seed: int
    weights: dict[str, Path]
    metrics: dict[str, Any] | None


class Estimator:
    """The three networks of a pipeline, in evaluation mode."""

    def __init__(self, source: Source) -> None:
        self.source = source
        options = source.recipe.fusion.model_copy(update={"model": source.model})
        self.visual, self.audio = VisualModel(source.recipe.visual), AudioModel(source.recipe.audio)
        self.fusion = make_fusion(options)
        for name, network in self.networks().items():
            _load(network, source.weights[name])

    def networks(self) -> dict[str, nn.Module]:
        """The networks by name."""
        return dict(zip(PARTS, (self.visual, self.audio, self.fusion), strict=True))

    def to(self, device: str | torch.device) -> Estimator:
        """Move the networks to a device. Raises UserError where there is no such device."""
        try:
            for network in self.networks().values():
                network.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"the networks cannot be moved to {device}: {str(error).splitlines()[0]}", "Write device=cpu.") from None
        return self

    @torch.no_grad()
    def sample(self, strip: NDArray[np.uint8], mel: Tensor) -> Tensor:
        """One sample's strip [71, 112, 112, 3] RGB and spectrograms [64, 64, 107] → (valence, arousal) [8 offsets, 8 clips, 2]."""
        device = next(self.fusion.parameters()).device
        pictures = torch.from_numpy(strip).to(device).float()
        frames = ((pictures - pictures.new_tensor(geometry.MEAN)) / pictures.new_tensor(geometry.STD)).permute(0, 3, 1, 2)
        size = self.source.recipe.visual.size
        if size != SIZE:
            frames = F.interpolate(frames, (size, size), mode="bilinear", antialias=size < SIZE)
        heard = mel.view(CLIPS, OFFSETS, *mel.shape[1:]).transpose(0, 1).to(device)  # clip end n = q + 8 j
        voices = torch.cat([self.audio(heard[q : q + 1])[0] for q in range(OFFSETS)])
        faces = torch.cat([self.visual(_clips(frames[q : q + SUBSEQUENCE]))[0] for q in range(OFFSETS)])
        stored = torch.float16 if self.source.recipe.features.dtype == "float16" else torch.float32  # as the features stage rounds them
        found: Tensor = self.fusion(voices.to(stored).float(), faces.to(stored).float())
        return found.float().cpu()

    def predict(self, material: Material, progress: Callable[[int, int], None] | None = None) -> NDArray[np.float32]:
        """Valence and arousal [rows, 2] of every frame, clipped to [-1, 1]: the numbers of the evaluate stage in full precision."""
        self.to(next(self.fusion.parameters()).device)
        total = len(geometry.samples_of(material.rows))
        values, idents = [], []
        for done, ((m, p), strip, mel) in enumerate(material.samples(), start=1):
            values.append(self.sample(strip, mel).numpy())
            idents.append((0, m, p, 0))
            if progress:
                progress(done, total)
        units = [UnitRows(0, "material", material.rows)]
        rows = dense(np.stack(values), np.array(idents), range(OFFSETS), units, self.source.recipe.label)
        return np.clip(rows["material"], -1, 1)


def _clips(frames: Tensor) -> Tensor:
    """Frames [64, 3, S, S] as the clips [1, 8, 3, 8, S, S] of a subsequence."""
    return frames.unflatten(0, (CLIPS, CLIP_FRAMES)).transpose(1, 2)[None]


def load_estimator(folder: Path, fold: str = OFFICIAL, model: str = "", seed: int = -1) -> Estimator:
    """The pipeline of an exported folder, or of a fold of a run folder (`model` empty: the recipe's; `seed` -1: its first).

    Raises UserError where the folder is neither, weights are missing, or an exported file is damaged or of another version.
    """
    exported = (folder / DESCRIPTION).is_file()
    estimator = Estimator(exported_source(folder) if exported else run_source(folder, fold, model, seed))
    return estimator.to("cpu")


def run_source(out: Path, fold: str = OFFICIAL, model: str = "", seed: int = -1) -> Source:
    """The weights of a fold of a run folder.

    Raises UserError where there is no recipe or the fold is not done: its weights may be of another recipe, from before it was submitted
    again; a model of other attention scores, say, has the same shapes. Likewise where a backbone was trained again since the features
    were made. UsageError for an unknown model.
    """
    if not (out / RECIPE).is_file():
        raise UserError(f"{out} is neither a run folder nor an exported model", "Give a folder of submit_folds.py or export_model.py.")
    recipe = load_recipe(out / RECIPE)
    name = model or recipe.fusion.model
    if name not in FUSION_MODELS:
        raise UsageError(f"there is no fusion model `{name}`", nearest(name, FUSION_MODELS))
    state = str(_read(out / fold / "status.json").get("state", ""))
    if state not in ("", "done"):
        sentence = f"fold {fold} of {out} is not done ({state}): its weights may be of other settings than {RECIPE}"
        raise UserError(sentence, "Wait for its job, or run it to its end; stages that are done are not repeated.")
    _same_model(out, fold, name, recipe)
    _same_backbones(out / fold)
    chosen = seed if seed >= 0 else recipe.fusion.seeds[0]
    folders = {"visual": "visual", "audio": "audio", "fusion": f"fusion/{name}-seed{chosen}"}
    weights = {part: out / fold / where / "best.safetensors" for part, where in folders.items()}
    metrics = out / fold / "metrics.json"
    return Source(recipe, fold, name, chosen, weights, json.loads(metrics.read_text()) if metrics.is_file() else None)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _same_model(out: Path, fold: str, name: str, recipe: Recipe) -> None:
    """Refuse weights that a recipe given to other folds since would load in silence: of another scale, say, they have the same shapes."""
    made, now = read_params(out / fold / "spool", "fusion"), flatten(recipe.model_dump(mode="json"))
    keys = [*SHAPED, *(key for key in now if key.startswith("fusion.jmt.") and name == "jmt")]
    for key in keys:
        if made.get(key, now[key]) != now[key]:
            sentence = f"fold {fold} of {out} was trained with {key}={made[key]}, its {RECIPE} is of other folds and says {now[key]}"
            raise UserError(sentence, f"Train the fold again, or put {key} back in {out / RECIPE}.")


def _same_backbones(fold: Path) -> None:
    """Refuse a backbone beside a fusion that was trained on another one's features: `run_fold.py stages=[visual]` alone leaves that."""
    made_by = _read(fold / "features" / "backbones.json")
    for part in ("visual", "audio"):
        weights = _read(fold / part / "done.json").get("weights")
        if weights and made_by.get(part, weights) != weights:
            sentence = f"{fold / 'features'} was made by another training of the {part} stage than {fold / part} holds now"
            raise UserError(sentence, f"Remove features and fusion of {fold} and run these stages, or put the {part} stage back.")


def exported_source(folder: Path) -> Source:
    """The weights of an exported folder, every file compared with its sha256."""
    try:
        text = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        version, files, takes = text["version"], text["files"], text["inputs"]
        pipeline = text["pipeline"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / DESCRIPTION} cannot be read", "Export the model again.") from None
    if version != VERSION or takes != describe_inputs(pipeline["size"]):
        raise UserError(f"{folder} was exported by another version of this package", "Export it again, or use that version.")
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            raise UserError(f"{path} is {'damaged' if path.is_file() else 'missing'}", "Export the model again, or copy the folder again.")
    weights = {part: folder / f"{part}.safetensors" for part in PARTS}
    recipe = load_recipe(folder / RECIPE)
    return Source(recipe, pipeline["fold"], pipeline["model"], pipeline["seed"], weights, text["metrics"])


def describe_inputs(size: int) -> dict[str, Any]:
    """What the networks take, in words and numbers: enough to feed the ONNX files from any language."""
    names = ("SEGMENT", "STEP", "CLIPS", "CLIP_FRAMES", "OFFSETS", "STRIP", "SIZE", "RATE", "WINDOW")
    return {
        "frames": {
            "what": f"RGB face crops of {SIZE}x{SIZE} aligned as Aff-Wild2's, resized to {size}x{size}; "
            "a clip is 8 frames, every 4th, and ends at its frame; black where there is no face",
            "size": size,
            "mean": geometry.MEAN,
            "std": geometry.STD,
        },
        "mel": {
            "what": "log-mel spectrogram [64, 107] of the 47,040 samples of mono sound at 44.1 kHz that end at the clip's end frame: "
            "periodic Hann, HTK mels without norm, power, dB, cut at top_db below its peak; then (dB - mean) / std",
            **{"n_fft": sound.N_FFT, "window": sound.HANN, "hop": sound.HOP, "mels": sound.MELS, "top_db": sound.TOP_DB},
            "mean": sound.MEL_MEAN,
            "std": sound.MEL_STD,
        },
        "subsequence": "8 clips, 32 frames apart; its features go to the fusion together",
        "geometry": {name.lower(): getattr(geometry, name) for name in names},
    }


def sha256(path: Path) -> str:
    """sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"there are no weights at {path}", "Run the stage that writes them first.")
    try:
        network.load_state_dict(read_state(path), strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} holds another model ({reason})", "Check the recipe it was made by.") from None
