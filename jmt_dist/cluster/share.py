"""Stages that another run folder has done already: linked into this one, so that they are not done again.

Finished folders of the stages before the fusion are copied by hard links; a stage's own key then decides whether it really fits,
and a folder that does not is moved aside by the fold as ever. `graph.py` says which run folders of a sweep do what the others share.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from jmt_dist.cluster.status import read_status
from jmt_dist.errors import UserError

STAGES = ("visual", "audio", "features")  # each needs those before it
DONE = "done.json"


def check_sources(sources: Sequence[Path], folds: Sequence[str]) -> None:
    """Raise UserError for a source that could share nothing: a slip in its path would cost the hours it should have saved."""
    for folder in sources:
        if not has_folds(folder, folds):
            what = "holds none of these folds" if folder.is_dir() else "is no folder"
            raise UserError(f"share={folder} {what}", "Name run folders, as submit_folds.py printed them.")


def has_folds(folder: Path, folds: Sequence[str]) -> bool:
    """Whether a run folder holds one of these folds."""
    return any((folder / fold).is_dir() for fold in folds)


def link_stages(sources: Sequence[Path], out: Path, fold: str) -> list[str]:
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


def require_done(needs: Sequence[Path], fold: str) -> None:
    """Raise UserError where a run folder that does a stage for several others has not done this fold.

    Every one of them would fail at the same stage for the same reason, after the same hours.
    """
    for folder in needs:
        found = read_status(folder, fold)
        if found.get("state") != "done":
            why = found.get("reason") or found.get("state") or "it has not started"
            raise UserError(
                f"{folder.name}, which this job shares with others, is not done: {why}", f"Mend that first; see {folder / fold}."
            )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
