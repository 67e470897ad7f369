"""Fetch the pretrained weights of the backbones into torchvision's cache, where jobs look for them.

Run it once, on a machine with a network that shares its home folder (or TORCH_HOME) with the compute nodes.

    python launch/fetch_weights.py
    python launch/fetch_weights.py weights=[kinetics400]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from jmt_dist.config import Options
from jmt_dist.program import run
from jmt_dist.recipe import build, word_layer


class FetchOptions(Options):
    """What to fetch."""

    weights: Annotated[list[Literal["kinetics400", "imagenet", "imagenet-resnet50"]], Field(min_length=1)] = Field(
        ["kinetics400", "imagenet"],
        description="kinetics400: R(2+1)D-18, 126 MB; imagenet: ResNet-18, 47 MB; imagenet-resnet50: for visual.backbone=resnet50, 103 MB",
    )


def main(words: list[str]) -> None:
    """Fetch what is not there yet; prints where it lies."""
    options = build(FetchOptions, [word_layer(word) for word in words])
    from jmt_dist.model.weights import URLS, cache_folder, fetch

    folder = cache_folder()
    print(f"weights: {', '.join(options.weights)} into {folder}", flush=True)
    for name in options.weights:
        path = fetch(URLS[name], folder, _progress(name))
        print(f"{name}: {path}")


def _progress(name: str) -> Callable[[int, int], None]:
    """A line per tenth in a log, one line that moves on a terminal."""
    shown = -1

    def show(done: int, size: int) -> None:
        nonlocal shown
        tenth = done * 10 // size if size else done >> 24
        if tenth == shown:
            return
        shown = tenth
        text = f"{name}: {done / 1e6:.0f} of {size / 1e6:.0f} MB" if size else f"{name}: {done / 1e6:.0f} MB"
        print(f"\r{text}" if sys.stdout.isatty() else text, end="" if sys.stdout.isatty() and done < size else "\n", flush=True)

    return show


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", FetchOptions)])
