"""Stages that an earlier variant of a sweep has already done: linked into this run folder, so that they are not done again.

A grid over the fusion would otherwise train the same backbones once per variant. Before the ranks of a fold start, finished
folders of the stages before the fusion are copied by hard links; a stage's own key then decides whether it really fits, and a
folder that does not is moved aside by the fold as ever. Under SLURM the batch script runs `python -m jmt_dist.cluster.share`.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from jmt_dist.config import Recipe

STAGES = ("visual", "audio", "features")  # each needs those before it
DONE = "done.json"


def same_stages(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes agree in all that the stages before the fusion depend on."""
    keys = ("seed", "engine", "folds", "visual", "audio", "features")
    return all(getattr(one, key) == getattr(other, key) for key in keys) and one.data.shards == other.data.shards


def link_stages(sources: list[Path], out: Path, fold: str) -> list[str]:
    """Link finished stages of a fold from the first source that has them; returns the stages linked.

    Nothing that is there already is touched. A link appears by one rename, so an interrupted copy is never taken for a stage.
    """
    linked = []
    for stage in STAGES:
        target = out / fold / stage
        source = next((folder / fold / stage for folder in sources if (folder / fold / stage / DONE).is_file()), None)
        if target.exists() or source is None:
            continue
        part = target.with_name(f".{stage}.{os.getpid()}")
        try:
            shutil.copytree(source, part, copy_function=_link)
            part.rename(target)
        except OSError as error:  # the fold can do without: it trains the stage itself
            shutil.rmtree(part, ignore_errors=True)
            print(f"{fold}: {stage} of {source.parent.parent} could not be linked ({error}); it is done again", flush=True)
            continue
        linked.append(stage)
        print(f"{fold}: {stage} is that of {source.parent.parent}", flush=True)
    return linked


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


if __name__ == "__main__":
    # <out> <number of sources> <source>… <fold of task 0> <fold of task 1> …
    count = int(sys.argv[2])
    names = sys.argv[3 + count :]
    link_stages([Path(name) for name in sys.argv[3 : 3 + count]], Path(sys.argv[1]), names[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))])
