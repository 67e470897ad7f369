"""Initial weights of the backbones: from torchvision's cache or a file, strictly checked, never downloaded in a job."""

from __future__ import annotations

import hashlib
import os
import pickle
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights
from torchvision.models.video import R2Plus1D_18_Weights

from jmt_dist.config import PRETRAINED, AudioOptions, VisualOptions
from jmt_dist.errors import UserError
from jmt_dist.model.heads import AudioModel, VisualModel

# torchvision's own addresses; its file names end in the first digits of the file's sha256
URLS: dict[str, str] = {
    "kinetics400": R2Plus1D_18_Weights.KINETICS400_V1.url,
    "imagenet": ResNet18_Weights.IMAGENET1K_V1.url,
    "imagenet-resnet50": ResNet50_Weights.IMAGENET1K_V1.url,
}
FETCH = "launch/fetch_weights.py"
_CLASSIFIERS = ("fc.", "classifier.")  # of the pretraining task: dropped by rule
_WRAPPERS = ("model", "state_dict", "module")  # keys under which training programs put a state dict
_Options = VisualOptions | AudioOptions


def cache_folder() -> Path:
    """Where torchvision keeps its weights: `checkpoints` below torch.hub's folder, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def cached_path(name: str) -> Path:
    """The place of a name of `URLS` in the cache."""
    return cache_folder() / URLS[name].rsplit("/", 1)[-1]


def find_weights(options: _Options) -> Path | None:
    """The file that `weights` names; None for `none`. UserError where it cannot be used or is not there."""
    stage = "visual" if isinstance(options, VisualOptions) else "audio"
    own = PRETRAINED[stage].get(options.backbone, "")
    if options.weights == "none":
        return None
    if isinstance(options, VisualOptions) and options.backbone == "r2plus1d" and options.depth == 10 and options.weights == own:
        raise UserError(f"{own} weights are for visual.depth=18; there are none for depth 10", "Take visual.weights=none or a file.")
    if options.weights in URLS:
        if options.weights != own:
            remedy = f"Take {own}, none or a file." if own else "Take none or a file."
            raise UserError(f"{stage}.weights={options.weights} fits another backbone than {stage}.backbone={options.backbone}", remedy)
        path = cached_path(own)
        if not path.is_file():
            raise UserError(
                f"the weights of {stage}.weights={own} are not in {path.parent}",
                f"Run `python {FETCH}` on a machine with a network; jobs never download.",
            )
        return path
    path = Path(options.weights).expanduser()
    if not path.is_file():
        raise UserError(
            f"{stage}.weights names a file that does not exist: {path}", f"Take {own or 'none'}, or a .pth or .safetensors file."
        )
    return path


def digest(options: _Options) -> str:
    """What a stage's key holds of its initial weights: `none`, or `sha256:` and the hash of the file."""
    path = find_weights(options)
    return "none" if path is None else f"sha256:{_sha256(path)}"


def load_initial(model: VisualModel | AudioModel, options: _Options) -> str:
    """Load the initial weights that `options.weights` names; returns one line that says which.

    A file may hold torchvision's network, our backbone, or our whole model with its head (.pt, .pth, .safetensors).
    Every key must be there and fit in shape, except a classifier's (`fc.`, `classifier.`), which is dropped. The
    audio network's first convolution may have three channels: it is averaged over them. From a network's file, the
    GRU and the head keep their random initialisation. Raises UserError for anything that does not fit.
    """
    path = find_weights(options)
    if path is None:
        return "random weights"
    found = _sha256(path)
    published = any(url.endswith(f"/{path.name}") for url in URLS.values())  # others may end in a date, as visual-20260115.pth
    expected = path.stem.rsplit("-", 1)[-1]
    if published and not found.startswith(expected):
        raise UserError(
            f"{path} is damaged: its sha256 should begin with {expected}, not {found[:8]}", f"Delete it and run `python {FETCH}`."
        )
    state = _strip(read_state(path))
    target, state = _target(model, state)
    own = target.state_dict()
    if isinstance(model, AudioModel):
        state = {key: _one_channel(value, own[key]) if key in own else value for key, value in state.items()}
    _check(path, own, state)
    target.load_state_dict(state, strict=False)  # strictness is `_check`'s: it knows which counters may be missing
    return f"{options.weights} ({path.name}, sha256 {found[:8]}...)"


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt, .pth (weights only, never code) or .safetensors file. UserError if it is none of these."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as weights: {reason}") from None
    except Exception as error:  # safetensors raises a class of its own, made in Rust
        raise UserError(f"{path} cannot be read as weights: {error}") from None
    while isinstance(values, Mapping) and not _is_state(values):
        inner = [values[key] for key in _WRAPPERS if isinstance(values.get(key), Mapping)]
        if not inner:
            break
        values = inner[0]
    if not isinstance(values, Mapping) or not _is_state(values):
        raise UserError(f"{path} does not hold a state dict", "Save `model.state_dict()`.")
    return dict(values)


def _is_state(values: Mapping[object, object]) -> bool:
    return bool(values) and all(isinstance(value, Tensor) for value in values.values())


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that wrappers for data parallelism add to every key."""
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _target(model: VisualModel | AudioModel, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The part of the model that the keys describe: all of it, its backbone, or torchvision's network in it."""
    roots = {key.split(".")[0] for key in state}
    if "backbone" in roots:
        return model, state
    if "net" in roots:
        return model.backbone, state
    net = getattr(model.backbone, "net", model.backbone)  # a backbone of one's own need not wrap one of torchvision's
    return net, {key: value for key, value in state.items() if not key.startswith(_CLASSIFIERS)}


def _one_channel(value: Tensor, own: Tensor) -> Tensor:
    """A first convolution [64, 3, 7, 7] averaged over its channels to [64, 1, 7, 7]; anything else as it is."""
    if value.ndim == 4 and own.ndim == 4 and value.shape[1] == 3 and own.shape[1] == 1:
        return value.mean(1, keepdim=True)
    return value


def _check(path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    # files older than PyTorch 0.4.1 lack the counters of batches; they only matter for momentum=None
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    for keys, fault in ((missing, "lacks"), (unknown, "has unknown")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"{path} does not fit the model: it {fault} `{keys[0]}`{more}", "Is it of the same network and depth?")
    if wrong:
        key = wrong[0]
        raise UserError(f"{path} does not fit the model: `{key}` is {[*state[key].shape]} and should be {[*own[key].shape]}")
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(f"{path} holds NaN or Inf in `{broken[0]}`")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, folder: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Download a file whose name ends in the first digits of its sha256; nothing is done where it is there and whole.

    `progress(bytes so far, bytes in all or 0)` is called per block. The file appears by one rename, after its check.
    UserError where the download fails or the content is not what the name says.
    """
    path = folder / url.rsplit("/", 1)[-1]
    expected = path.stem.rsplit("-", 1)[-1]
    if path.is_file() and _sha256(path).startswith(expected):
        return path
    part = path.with_suffix(f".part-{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as source, part.open("wb") as target:
            size, done = int(source.headers.get("Content-Length") or 0), 0
            while block := source.read(1 << 20):
                target.write(block)
                done += len(block)
                if progress:
                    progress(done, size)
        if not _sha256(part).startswith(expected):
            raise UserError(f"{url} gave a file whose sha256 does not begin with {expected}", "Try again, or copy the file from elsewhere.")
        os.replace(part, path)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{url} could not be fetched: {reason}", f"Fetch it elsewhere and put it into {folder}.") from None
    finally:
        part.unlink(missing_ok=True)
    return path
