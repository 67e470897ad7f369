"""What one submission is: the same plain record for the local scheduler, the SLURM array and the jobs themselves."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmt_dist.config import Recipe, Site
from jmt_dist.errors import UserError

RUN_FOLD = "jmt_dist.train.fold:run_fold"
COMPARE = "jmt_dist.cluster.compare:compare"


@dataclass(frozen=True)
class Plan:
    """One submission.

    `folds` are all it is about, `todo` those that are not done; `work` is the hash of what a fold computes (recipe and
    manifest); `submission` names it (UTC time); `function` and `compare` (or none) are dotted names `module:function`; `share` are run
    folders whose finished stages may be linked, `needs` those that must have done theirs for this one.
    """

    out: Path
    recipe: Recipe
    site: Site
    folds: tuple[str, ...]
    todo: tuple[str, ...]
    work: str
    submission: str
    snapshot: Path
    function: str = RUN_FOLD
    compare: str = COMPARE
    share: tuple[Path, ...] = ()
    needs: tuple[Path, ...] = ()

    @property
    def jobs(self) -> Path:
        """Folder of this submission's pickles and logs."""
        return self.out / "jobs" / self.submission

    def describe(self) -> dict[str, Any]:
        """What `resume_jobs.py` must know beyond recipe and site; every jobs.json holds it."""
        return {"submission": self.submission, "folds": list(self.folds), "share": [str(folder) for folder in self.share]}


def work_hash(recipe: Recipe, manifest: str) -> str:
    """Hash of what a fold computes: the resolved recipe and the shards' manifest."""
    text = json.dumps({"recipe": recipe.model_dump(mode="json"), "manifest": manifest}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def resolve(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def check_owner(out: Path, writable: bool = True) -> None:
    """Raise UserError where a folder is not ours or (`writable`) others may write into it: our jobs unpickle what lies there."""
    info = out.stat()
    if info.st_uid != os.geteuid():
        raise UserError(f"{out} belongs to another user (id {info.st_uid})", "Choose another out=.")
    if writable and info.st_mode & 0o022:
        raise UserError(f"others may write into {out}, and jobs execute what lies there", f"Run: chmod go-w {out}")
