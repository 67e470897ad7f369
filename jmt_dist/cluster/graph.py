"""Which stages the variants of a sweep have in common, and what must be done before what: pure functions, without torch.

A stage that two or more variants would do alike becomes a run folder of its own, `shared/<stage>-<hash>`, which those variants
link from. The hash here only groups: each stage's own key, made from all its result depends on, decides in the job.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from jmt_dist.config import Recipe, Stage

SHARED = "shared"


@dataclass(frozen=True)
class Node:
    """A run folder of a sweep: its recipe, the run folders that must be done before it, and its level (0 to 2)."""

    name: str
    recipe: Recipe
    level: int
    needs: tuple[str, ...] = ()


def stage_hash(recipe: Recipe, stage: str) -> str:
    """8 hexadecimal digits of what `visual`, `audio` or `features` depends on, as far as a recipe says it."""
    data = recipe.model_dump(mode="json")
    parts = [stage, data["data"]["shards"], data["folds"], data["engine"], data["seed"], data["label"]]
    if stage == "features":
        stored = {key: value for key, value in data["features"].items() if key != "batch"}
        parts += [stage_hash(recipe, "visual"), stage_hash(recipe, "audio"), stored, data["evaluate"]["test"]]
    else:
        parts.append(data[stage])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def graph(recipes: Mapping[str, Recipe]) -> dict[str, Node]:
    """The run folders of a sweep by name, those that others need first."""
    users: dict[tuple[Stage, str], list[str]] = {}
    stages: tuple[Stage, ...] = ("visual", "audio", "features")
    for stage in stages:
        for name, recipe in recipes.items():
            if stage in recipe.stages:
                users.setdefault((stage, stage_hash(recipe, stage)), []).append(name)
    shared = {key: names for key, names in users.items() if len(names) > 1}
    nodes: dict[str, Node] = {}
    for (stage, digest), names in sorted(shared.items(), key=lambda item: stages.index(item[0][0])):
        leader = max(names, key=lambda name: len(recipes[name].stages))
        first = recipes[leader]
        needs: list[tuple[Stage, str]] = [(before, stage_hash(first, before)) for before in stages[:2] if stage == "features"]
        name = f"{SHARED}/{stage}-{digest}"
        # a backbone that only one variant would train is trained where the features are made
        own: list[Stage] = [before for before, digest in needs if before in first.stages and (before, digest) not in shared]
        own.append(stage)
        recipe = first.model_copy(update={"stages": own, "name": f"{first.name.removesuffix(f'-{leader}')}-{stage}-{digest}"})
        nodes[name] = Node(name, recipe, int(stage == "features"), tuple(f"{SHARED}/{b}-{d}" for b, d in needs if (b, d) in shared))
    for name, recipe in recipes.items():
        found = [(stage, stage_hash(recipe, stage)) for stage in stages if stage in recipe.stages]
        keys = [key for key in found if key in shared]
        if keys and keys[-1][0] == "features":  # its folder holds the backbones, too
            keys = keys[-1:]
        nodes[name] = Node(name, recipe, 2, tuple(f"{SHARED}/{stage}-{digest}" for stage, digest in keys))
    return nodes
