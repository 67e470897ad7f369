"""Backbones by name. One of your own is one registered function, in any module that the jobs can import:

    # mypackage/faces.py
    from jmt_dist.model.registry import visual_backbone

    @visual_backbone("mine")
    def make(options):          # options: config.VisualOptions
        return MyNetwork()      # clips [N, 3, 8, H, W] -> features [N, 512]

and `visual.backbone=mypackage.faces:mine` in a recipe. An audio backbone (`audio_backbone`, `audio.backbone`) turns spectrograms
[B, C, 64, T] of C consecutive clips into features [B, C, 512]. Initial weights: `none`, or a file with the module's own keys.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from jmt_dist.config import AudioOptions, VisualOptions
from jmt_dist.errors import UserError
from jmt_dist.model.attention import WIDTH

MakeVisual = Callable[[VisualOptions], nn.Module]
MakeAudio = Callable[[AudioOptions], nn.Module]
Make = TypeVar("Make")

_VISUAL: dict[str, MakeVisual] = {}
_AUDIO: dict[str, MakeAudio] = {}


def visual_backbone(name: str) -> Callable[[MakeVisual], MakeVisual]:
    """Register a function that makes a visual backbone: options -> module, clips [N, 3, 8, H, W] -> features [N, 512]."""
    return _register(_VISUAL, name)


def audio_backbone(name: str) -> Callable[[MakeAudio], MakeAudio]:
    """Register a function that makes an audio backbone: options -> module, spectrograms [B, C, 64, T] -> features [B, C, 512]."""
    return _register(_AUDIO, name)


def _register(known: dict[str, Make], name: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        if known.get(name, make) is not make:
            raise ValueError(f"there is a backbone {name!r} already")
        known[name] = make
        return make

    return keep


def make_visual(options: VisualOptions) -> nn.Module:
    """The visual backbone that a recipe names. Raises UserError for an unknown one."""
    return _find(_VISUAL, "visual", options.backbone)(options)


def make_audio(options: AudioOptions) -> nn.Module:
    """The audio backbone that a recipe names. Raises UserError for an unknown one."""
    return _find(_AUDIO, "audio", options.backbone)(options)


def _find(known: dict[str, Make], stage: str, wanted: str) -> Make:
    module, _, name = wanted.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"{stage}.backbone={wanted}: {module} cannot be imported ({error})", "Install it where the jobs run, or mend its name."
            ) from error
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(sorted(known))}; your own as module:name."
        raise UserError(f"there is no {stage} backbone {name}", remedy)
    return known[name]


def checked(features: Tensor, stage: str) -> Tensor:
    """The features of a backbone, which must be [..., 512]. Raises UserError otherwise."""
    size = features.shape[-1]
    if size != WIDTH:
        raise UserError(
            f"the {stage} backbone gives features of {size}, the fusion takes {WIDTH}", f"End it with a linear layer to {WIDTH}."
        )
    return features
