"""Whether stored features are as they were stored, and of the backbones beside them: asked by one rank before they are used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from jmt_dist.data.feature_tars import AGAIN, feature_damage, read_description
from jmt_dist.errors import UserError
from jmt_dist.train import stop
from jmt_dist.train.plan import FoldPlan
from jmt_dist.train.ranks import apart, from_first, rank
from jmt_dist.train.results import finished, write_json

BACKBONES = "backbones.json"  # in a folder of features: the weights that made them


def require_own(plan: FoldPlan, folder: Path) -> None:
    """Raise UserError where features were made by another training of a backbone than lies beside them now. Collective.

    A stage whose folder was removed is trained again under the same key, and on a GPU, or with mended code, comes out otherwise.
    """
    for name in ("visual", "audio"):
        plan.key(name)  # by every rank: where it cannot be made, of lost initial weights, all say so
    other = from_first(_other_backbone(plan, folder) if rank() == 0 else "")
    if other:
        made = " and ".join(name for name in ("features", "fusion", "finetune") if (plan.folder / name).exists())
        raise UserError(
            f"{folder} was made by another training of the {other} stage than {plan.folder / other} holds now",
            f"Remove {made} of {plan.folder}: they are then made anew; or put the {other} stage back.",
        )


def note_backbones(plan: FoldPlan, folder: Path) -> None:
    """Write down the weights that the features of a folder are made by; by the first rank."""
    if rank() == 0 and not (folder / BACKBONES).exists():
        write_json(folder / BACKBONES, _backbones(plan))


def _backbones(plan: FoldPlan) -> dict[str, str]:
    done = {name: finished(plan.folder / name, plan.key(name)) for name in ("visual", "audio")}
    return {name: str(result["weights"]) for name, result in done.items() if result and result.get("weights")}


def _other_backbone(plan: FoldPlan, folder: Path) -> str:
    try:
        made_by = dict(json.loads((folder / BACKBONES).read_text()))
    except (OSError, ValueError, TypeError):
        return ""  # stored before this was written down
    return next((name for name, weights in _backbones(plan).items() if made_by.get(name, weights) != weights), "")


def require_whole(plan: FoldPlan, folder: Path, parts: Iterable[str]) -> None:
    """Raise UserError where features of `parts` in a finished folder are not as they were stored. Collective, as `damage_of_features`."""
    require_own(plan, folder)
    found = damage_of_features(plan, folder, parts)
    if found:
        raise UserError(found, AGAIN)


def stages_missing(plan: FoldPlan) -> str:
    """The stages that must be run before there are features of this recipe, as a word of the command line."""
    before = [name for name in ("visual", "audio") if finished(plan.folder / name, plan.key(name)) is None]
    return f"stages=[{','.join([*before, 'features'])}]"


def damage_of_features(plan: FoldPlan, folder: Path, parts: Iterable[str]) -> str:
    """A sentence on what of a finished folder is not stored, or not as it was; empty where all is there. Collective.

    The first rank reads every byte, a second per GB, of what this process has not read before; an unfinished folder is not looked
    at. Raises Stopped, on every rank, where a stop is requested meanwhile.
    """
    left = [part for part in parts if (folder, part) not in plan.checked]
    if not left:
        return ""
    box: list[str | None] = []

    def moved(place: str) -> None:
        plan.around.watch.beat(f"checking {folder}{place and ', '}{place}", alone=not place)

    moved("")
    apart((lambda on: box.append(_look(folder, left, on))) if rank() == 0 else None, moved)
    found = from_first(box[0] if box else None)
    if found is None:
        raise stop.Stopped(stop.requested() or "another rank was asked to stop")
    if not found:
        plan.checked.update((folder, part) for part in left)
    return str(found)


def _look(folder: Path, parts: list[str], on: Callable[[], None]) -> str | None:
    def between() -> None:
        on()
        if stop.requested():
            raise stop.Stopped(stop.requested())

    if not (folder / "done.json").exists():
        return ""
    try:
        found = feature_damage(folder, parts, between)
        if found:
            return found
        description = read_description(folder)
        missing = [part for part in parts if not description.of(folder, part)]
        if missing:  # test units that were not asked for when the others were stored
            return f"{folder} holds no features of part {missing[0]}"
        if not description.checkable:
            print(f"{folder} was stored without digests: its bytes cannot be checked; remove it to have it made again", flush=True)
    except stop.Stopped:
        return None
    return ""
