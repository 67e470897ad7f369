"""A sweep: variants of one recipe as one job array; what several of them share is done once, before them."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from jmt_dist.cluster import plan as plans
from jmt_dist.cluster import status, submit
from jmt_dist.cluster.control import SWEEP, cancel, live_jobs
from jmt_dist.cluster.graph import SHARED, Node, graph
from jmt_dist.cluster.options import Range, SubmitOptions, SweepFile, SweepOptions
from jmt_dist.cluster.plan import Plan
from jmt_dist.config import Recipe, Site
from jmt_dist.errors import UsageError, UserError
from jmt_dist.program import FAILED, OK, OMISSIONS
from jmt_dist.recipe import build, dump, load_recipe, parse_word, read_layers

COMPARE = "jmt_dist.cluster.compare:compare_sweep"
LEVELS = ("backbones", "features", "variants")
RESERVED = (SHARED, "jobs", "snapshot")  # folders that a sweep has beside those of its variants


def read_sweep(path: Path) -> SweepFile:
    """A sweep file with its variants spelt out; the recipe it names is relative to it. Raises UsageError, one line."""
    sweep = build(SweepFile, read_layers(path))
    found = sweep.variants or _named(_combinations(sweep) if sweep.grid else _draws(sweep))
    for name in found:
        if not re.fullmatch(r"[\w\-][\w.\-]*", name) or name in RESERVED:
            raise UsageError(
                f"variant {name!r} of {path} cannot name a folder",
                f"Use letters, digits, `-`, `_` and `.`; a sweep has folders {', '.join(RESERVED)} of its own.",
            )
    return sweep.model_copy(update={"recipe": str(path.parent / sweep.recipe), "variants": found})


def _combinations(sweep: SweepFile) -> list[dict[str, Any]]:
    return [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]


def _draws(sweep: SweepFile) -> list[dict[str, Any]]:
    """Draw after draw from one stream: more samples later repeat the first ones."""
    stream = random.Random(sweep.seed)
    return [{key: _draw(stream, values) for key, values in sweep.random.items()} for _ in range(sweep.samples)]


def _draw(stream: random.Random, values: list[Any] | Range) -> Any:
    if isinstance(values, list):
        return stream.choice(values)
    low, high = values.low, values.high
    whole = isinstance(low, int) and isinstance(high, int)
    if whole and not values.log:
        return stream.randint(int(low), int(high))
    drawn = math.exp(stream.uniform(math.log(low), math.log(high))) if values.log else stream.uniform(low, high)
    return min(max(round(drawn), int(low)), int(high)) if whole else min(max(float(f"{drawn:.3g}"), low), high)


def _named(points: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Words by variant, named after what differs: `lr0.0005-batch2`; equal draws are one variant."""
    keys = list(points[0])
    last = [key.rsplit(".", 1)[-1] for key in keys]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}
    found: dict[str, list[str]] = {}
    for point in points:
        words = [f"{key}={json.dumps(value)}" for key, value in point.items()]
        name = "-".join(f"{short[key]}{_plain(value)}" for key, value in point.items())
        unique, number = name, 1
        while unique in found and found[unique] != words:
            number += 1
            unique = f"{name}-{number}"
        found[unique] = words
    return found


def _plain(value: Any) -> str:
    return re.sub(r"[^\w.\-]+", "_", f"{value:g}" if isinstance(value, float) else str(value)).strip("_")


def variants(path: Path, words: list[str]) -> dict[str, Recipe]:
    """The recipe of every variant: the sweep's recipe, the variant's words, then `words`, which all variants share.

    All are built before any is submitted, so that a mistake in the last one costs nothing. A variant is named
    `<recipe>-<variant>` unless its words name it.
    """
    sweep = read_sweep(path)
    recipes = {}
    for name, changes in sweep.variants.items():
        try:
            recipe = load_recipe(sweep.recipe, [*changes, *words])
        except UsageError as error:
            raise UsageError(f"variant `{name}` of {path}: {error.sentence}", error.remedy) from None
        named = any(parse_word(word)[0] == "name" for word in [*changes, *words])
        recipes[name] = recipe if named else recipe.model_copy(update={"name": f"{recipe.name}-{name}"})
    return recipes


def submit_sweep(options: SweepOptions, site: Site, words: list[str], function: str = plans.RUN_FOLD, compare: str = COMPARE) -> int:
    """Submit every variant of a sweep file to `<out>/<variant>`."""
    path = Path(options.sweep)
    out = Path(options.out or Path("runs") / path.stem).expanduser().resolve()
    return submit_recipes(options, variants(path, words), out, site, function, compare)


def submit_recipes(options: SweepOptions, recipes: dict[str, Recipe], out: Path, site: Site, function: str, compare: str) -> int:
    """Submit recipes by name to `<out>/<name>`, and what several of them share to `<out>/shared/`; the program's exit code.

    SLURM: at most three arrays, backbones before features before variants, and a comparison: 0 once they are queued, 3 where SLURM
    refused the comparison alone. Local: one run folder after the other, 0 all done, 3 some folds failed, 1 all failed.
    """
    os.umask(0o077)
    nodes = graph(recipes)
    work = {name: _plan(options, node, out, site, function) for name, node in nodes.items()}
    _announce(nodes, work, out)
    levels = [[work[name] for name, node in nodes.items() if node.level == level] for level in range(len(LEVELS))]
    if options.dry:
        return _dry(options, levels, out, site)
    if not any(plan.todo for plan in work.values()) and (not options.compare or (out / "comparison.csv").is_file()):
        print(f"nothing to do: all {len(recipes)} variants are done\n{out}")
        return OK
    submit.make_folder(out)
    with submit.alone(out):
        _check_no_live_jobs(work, out)
        levels = _prepare(nodes, levels, out)
        if site.executor == "slurm" and any(plan.todo for plan in work.values()):
            code = _submit(options, levels, out, compare)
        else:
            return _run_here(options, levels, out, compare)
    if options.wait:
        from jmt_dist.cluster.watch import watch

        return max(code, watch(out, lines=15), key=(OK, OMISSIONS, FAILED).index)
    return code


def _plan(options: SweepOptions, node: Node, out: Path, site: Site, function: str) -> Plan:
    own = SubmitOptions(recipe="", site="", out=str(out / node.name), folds=options.folds, share=options.share)
    return replace(submit.make_plan(own, node.recipe, site, function, ""), needs=tuple(out / name for name in node.needs))


def _announce(nodes: dict[str, Node], work: dict[str, Plan], out: Path) -> None:
    names = [name for name, node in nodes.items() if node.level == 2]
    site = next(iter(work.values())).site
    todo = sum(len(work[name].todo) for name in names)
    print(f"sweep of {len(names)} variant(s) in {out}: {todo} fold job(s) left, at most {site.parallel} at a time, site {site.name}")
    for name, node in nodes.items():
        if node.level < 2:
            users = sum(name in other.needs for other in nodes.values() if other.level == 2) or sum(name in n.needs for n in nodes.values())
            print(f"done once, {len(work[name].todo)} fold job(s): {name}, for {users} others")


def _arrays(levels: list[list[Plan]], out: Path) -> list[Any]:
    from jmt_dist.cluster.slurm import Array

    found = []
    for title, level in zip(LEVELS, levels, strict=True):
        tasks = tuple((plan, fold) for plan in level for fold in plan.todo)
        if tasks:
            folder = out / "jobs" / tasks[0][0].submission / title
            found.append(Array(f"{out.name}-{title}", out, folder, tasks))
    return found


def _dry(options: SweepOptions, levels: list[list[Plan]], out: Path, site: Site) -> int:
    if site.executor == "slurm":
        from jmt_dist.cluster.slurm import scripts
        from jmt_dist.cluster.snapshot import snapshot_folder

        code = snapshot_folder(out)
        levels = [[replace(plan, snapshot=code, submission=levels[-1][0].submission) for plan in level] for level in levels]
        arrays = [replace(array, after="<array before>" * (place > 0)) for place, array in enumerate(_arrays(levels, out))]
        for title, text in scripts(arrays, options.compare) if arrays else []:
            print(f"\n### sbatch script of: {title}\n{text}")
    print(f"dry run: nothing was written; the folder would be {out}")
    return OK


def _check_no_live_jobs(work: dict[str, Plan], out: Path) -> None:
    asked: dict[str, Any] = {}
    for name, plan in work.items():
        alive = live_jobs(plan.out, asked)
        if alive:
            one = ", ".join(f"{name} {fold} (job {job})" for fold, job in alive.items())
            raise UserError(
                f"jobs of an earlier submission are still there: {one}", f"Run: python launch/cancel_jobs.py out={shlex.quote(str(out))}"
            )


def _prepare(nodes: dict[str, Node], levels: list[list[Plan]], out: Path) -> list[list[Plan]]:
    """One copy of the code for all; recipe, site and runs of each; what the sweep consists of. All get one submission's name."""
    from jmt_dist.cluster import tracking
    from jmt_dist.cluster.snapshot import take_snapshot

    snapshot = take_snapshot(out)
    dump(next(plan.site for level in levels for plan in level), out / "site.yaml")
    stamp = next(plan.submission for level in levels for plan in level)
    ready = [[replace(plan, snapshot=Path(snapshot.path), submission=stamp) for plan in level] for level in levels]
    for plan in (plan for level in ready for plan in level if plan.todo):
        submit.make_folder(plan.out)
        dump(plan.recipe, plan.out / "recipe.yaml")
        shutil.copyfile(out / "site.yaml", plan.out / "site.yaml")
        status.write_json(plan.out / "snapshot.json", status.read_json(out / "snapshot.json"))
        if tracking.sends(plan.site):
            tracking.prepare(plan, snapshot)
        else:  # thousands of runs would take a minute here, and no job needs them
            tracking.only_spool(plan)
    names = [name for level in range(len(LEVELS)) for name, node in nodes.items() if node.level == level]
    variants = [name for name in names if nodes[name].level == 2]
    status.write_json(out / SWEEP, {"submission": stamp, "runs": names, "variants": variants})
    print(submit.describe(snapshot), flush=True)
    return ready


def _submit(options: SweepOptions, levels: list[list[Plan]], out: Path, compare: str) -> int:
    from jmt_dist.cluster import slurm

    after = ""
    try:
        with slurm.submitting(levels[-1][0].site):
            for array in _arrays(levels, out):
                after, jobs = slurm.submit_array(replace(array, after=after))
                print(f"submitted array {after}: {len(jobs)} task(s), {array.jobs.name}", flush=True)
    except UserError:
        if after:  # a half of a sweep is of no use: what is queued already goes again
            cancel(out)
        raise
    missing = submit.submit_comparison(array, after, out / SWEEP, compare) if options.compare else ""
    print(f"see: python launch/show_status.py out={shlex.quote(str(out))}\n{out}")
    return OMISSIONS if missing else OK


def _run_here(options: SweepOptions, levels: list[list[Plan]], out: Path, compare: str) -> int:
    states: list[str] = []
    for level in levels:
        for plan in level:
            found: dict[str, str] = {}
            if plan.todo:
                from jmt_dist.cluster.local import Scheduler

                print(f"\n== {plan.out.relative_to(out)}", flush=True)
                found = Scheduler(plan).run()
            if level is levels[-1]:
                states += [found.get(fold, "done") for fold in plan.folds]
    if options.compare and "done" in states:
        plans.resolve(compare)(out)
    done = states.count("done")
    print(f"{done} of {len(states)} folds of {len(levels[-1])} variant(s) are done\n{out}")
    return OK if done == len(states) else OMISSIONS if done else FAILED
