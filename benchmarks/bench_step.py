"""What storing features buys the fusion stage, what one of its steps costs, and how fast the stages are.

    python benchmarks/bench_step.py --json benchmarks/results
    python benchmarks/bench_step.py before=bfda081 --json benchmarks/results     the step, against an older commit's, too

1. `ratio_features_vs_recompute`: an epoch of the fusion stage from stored features, against the same epoch with the frozen backbones
   recomputed for each sample from loose JPEGs and WAVs, as the authors' public code does: measured at the demo's geometry;
   at the paper's, from one measured forward of each backbone (the formula is in the result).
2. Milliseconds of a fusion step at the paper's sizes (JMT, 15 million parameters), wall clock and processor.
3. Steps per second and share of time spent waiting for data, of each stage of the demo's recipe, on one rank and on two.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from common import REPOSITORY, Result, alternate, median, run, use_cores
from loader_data import loose_samples
from pydantic import Field
from recompute import Recompute, seconds_of_parts
from trees import fixture, packed

from jmt_dist.config import AudioOptions, Options, Positive, Recipe, Site, VisualOptions
from jmt_dist.errors import UserError
from jmt_dist.model.heads import AudioModel, VisualModel
from jmt_dist.recipe import load_recipe
from jmt_dist.track import names
from jmt_dist.track.spool import read_metrics
from jmt_dist.train import ranks
from jmt_dist.train.extract import trained_backbones
from jmt_dist.train.fuse import fusion_stage, stored_features
from jmt_dist.train.plan import FoldPlan, open_parts
from jmt_dist.train.stage import Stage, Surroundings, Trainer

CPU = torch.device("cpu")
DEMO = REPOSITORY / "launch" / "recipes" / "demo.yaml"
FORMULA = "(read + visual + audio + step(batch) / batch) / (step(batch) / batch), seconds per subsequence"


class StepBench(Options):
    """What is measured."""

    units: Positive = Field(24, ge=6, description="units of the fixture; the demo has 24")
    rows: Positive = Field(256, description="frames per unit; the demo has 256")
    rounds: Positive = Field(3, description="rounds; every side runs once in each")
    steps: Positive = Field(40, description="fusion steps timed per round and side")
    tries: Positive = Field(2, description="forwards at the paper's geometry, of which the median counts")
    threads: Positive = Field(2, description="torch's threads of a rank, and cores")
    stage_steps: Positive = Field(30, description="steps of each stage timed on one and on two ranks")
    ranks: list[Positive] = Field([1, 2], min_length=1, description="numbers of ranks on which the stages are timed, the first one 1")
    before: str = Field("", description="a commit whose fusion step is timed in turn with this one's; empty: none")
    precision: str = Field("fp32", description="engine.precision of the fusion step")


def bench(options: StepBench, out: Path) -> Result:
    """All three."""
    use_cores(options.threads)
    torch.set_num_threads(options.threads)
    source = fixture(out, options.units, options.rows, 1)
    manifest = packed(source, "wav", 1)
    stages = _stages(options, out, manifest.folder)
    steps = _steps(options)
    ours, theirs, parts = _epochs(options, out, source, manifest)
    paper = _paper(options, parts, steps)
    demo = median(theirs) / median(ours)
    values = {
        "ratio_features_vs_recompute": median([demo]),
        "ratio_at_papers_geometry": {batch: one["ratio"] for batch, one in paper.items()},
        "target_at_papers_geometry": 100,
        "demo": {"seconds_epoch_from_features": ours, "seconds_epoch_recomputed": theirs, **parts["demo"]},
        "paper": {"formula": FORMULA, "seconds_per_subsequence": parts["paper"], "batches": paper},
        "fusion_step_ms": steps,
        "stages": stages,
        "load_average_after": os.getloadavg()[0],
    }
    return Result(values, _table(values))


# ---- steps of the fusion


def _steps(options: StepBench) -> dict[str, Any]:
    """Median wall and processor ms of a step by batch and side, and how much `before` takes of this code's."""
    with _checkout(options.before) as older:
        codes = {"now": REPOSITORY, **({"before": older} if older else {})}
        found: dict[str, Any] = {}
        for batch in (2, 64):
            found[str(batch)] = _compared(codes, batch, options.steps if batch == 2 else max(8, options.steps // 4), options)
    return found


def _compared(codes: dict[str, Path], batch: int, count: int, options: StepBench) -> dict[str, Any]:
    """One batch size: the codes in turn."""
    cpu: dict[str, list[float]] = {side: [] for side in codes}
    wall = alternate({side: partial(_one, code, batch, count, options, cpu[side]) for side, code in codes.items()}, options.rounds)
    medians: dict[str, Any] = {side: {"wall": median(wall[side]), "cpu": median(cpu[side]), "rounds": wall[side]} for side in codes}
    if "before" in codes:
        for kind in ("wall", "cpu"):
            medians[f"before_over_now_{kind}"] = median([medians["before"][kind] / medians["now"][kind]])
    return medians


def _one(code: Path, batch: int, count: int, options: StepBench, cpu: list[float]) -> float:
    words = [str(batch), str(count), str(options.threads), options.precision]
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": str(options.threads), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "step_worker.py"), *words]
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        raise UserError(f"steps at batch {batch} ended with exit code {answer.returncode}", "What was printed above says why.")
    times = json.loads(answer.stdout.splitlines()[-1])
    cpu.append(median([one[1] for one in times]))
    return median([one[0] for one in times])


@contextmanager
def _checkout(commit: str) -> Iterator[Path | None]:
    """An older commit's files in a folder of their own while the block runs."""
    if not commit:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="jmt-before-") as folder:
        archive = subprocess.run(["git", "archive", commit, "jmt_dist"], cwd=REPOSITORY, stdout=subprocess.PIPE)
        if archive.returncode:
            raise UserError(f"before={commit} is no commit of this repository", "Give one that `git log` shows.")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


# ---- stages on one rank and on two


def _words(options: StepBench, shards: Path) -> list[str]:
    steps = [f"{stage}.max_steps={options.stage_steps + 10}" for stage in ("visual", "audio", "fusion")]
    steps += [f"{stage}.{word}=1000" for stage in ("visual", "audio", "fusion") for word in ("max_epochs", "patience")]
    return [f"data.shards={shards}", *steps, "features.offsets=[0]", "fusion.offsets_per_epoch=1", "fusion.validation_offsets=[0]",
            "evaluate.offsets=[0]", "fusion.seeds=[0]", "fusion.baselines=[]", "stages=[visual,audio,features,fusion]"]  # fmt: skip


def _stages(options: StepBench, out: Path, shards: Path) -> dict[str, Any]:
    """The demo's stages by launch/run_fold.py; medians over groups of ten steps, the first group left out."""
    found: dict[str, Any] = {}
    for world in options.ranks:
        folder = out / f"stages-{world}"
        shutil.rmtree(folder, ignore_errors=True)
        _run_fold([*_words(options, shards), f"out={folder}", "site.cpus_per_rank=1"], world)
        curves = read_metrics(folder / "official" / "spool")
        for name, points in curves.items():
            for metric, key in ((names.SPEED, "steps_per_s"), (names.WAIT, "data_wait")):
                if name.endswith(metric):
                    stage = name.removesuffix(f"/{metric}")
                    found.setdefault(stage, {}).setdefault(f"ranks_{world}", {})[key] = median([value for _, value in points])
    for values in found.values():
        for world in options.ranks[1:]:
            values[f"ratio_{world}_ranks"] = median([values[f"ranks_{world}"]["steps_per_s"] / values["ranks_1"]["steps_per_s"]])
    return found


def _run_fold(words: list[str], world: int) -> None:
    """launch/run_fold.py on `world` ranks, each on one thread."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(REPOSITORY / "launch" / "run_fold.py"), f"recipe={DEMO}"]
    command += [f"site={REPOSITORY / 'slurm' / 'sites' / 'local.yaml'}", "fold=official", *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=REPOSITORY) for rank in range(world)
    ]
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()  # of a benchmark that was stopped
    if any(codes):
        raise UserError(f"a fold on {world} ranks ended with exit codes {codes}", "What was printed above says why.")


# ---- features against recomputing


def _plan(recipe: Recipe, folder: Path) -> FoldPlan:
    manifest, parts = open_parts(recipe, Site(), "official")
    around = Surroundings(recipe.engine, CPU, lambda values, step: None, lambda **values: None)
    return FoldPlan(recipe, Site(), "official", folder, CPU, manifest, parts, around)


def _epochs(options: StepBench, out: Path, source: Path, manifest: Any) -> tuple[list[float], list[float], dict[str, Any]]:
    """Seconds of an epoch per round, from features and recomputed, and what reading and backbones take of it."""
    ranks.start(CPU)
    recipe = load_recipe(DEMO, _words(options, manifest.folder))
    plan = _plan(recipe, out / "stages-1" / "official")
    train, validation = stored_features(plan, "train"), stored_features(plan, "validation")
    visual, audio = (model.backbone.eval() for model in trained_backbones(plan))
    loose = loose_samples(source, manifest, source.with_name(f"{source.name}-clips"))
    recompute = Recompute(train, loose, visual, audio, recipe.visual.size, recipe.fusion.batch)
    difference = _difference(recompute)
    stage = fusion_stage(plan, "jmt", 0, train, validation)
    found = alternate({"features": lambda: _epoch(stage, out, None), "recomputed": lambda: _epoch(stage, out, recompute)}, options.rounds)
    demo = seconds_of_parts(loose[0], visual, audio, recipe.visual.size, 5)
    big = VisualModel(VisualOptions(weights="none")).backbone.eval(), AudioModel(AudioOptions(weights="none")).backbone.eval()
    ranks.leave()
    extra = {
        "subsequences": len(train.ident),
        "batch": recipe.fusion.batch,
        "seconds_per_subsequence": demo,
        "feature_difference": difference,
    }
    return found["features"], found["recomputed"], {"demo": extra, "paper": seconds_of_parts(loose[0], *big, 224, options.tries)}


def _difference(recompute: Recompute) -> float:
    """Both sides train on the same: largest difference of a recomputed feature from the stored one, in standard deviations of that."""
    (batch,) = (next(iter(recompute.batches(0))),)
    place = [recompute.features.ident[:, :3].tolist().index(row[:3]) for row in batch["id"].tolist()]
    worst = 0.0
    for name, stored in zip(("visual", "audio"), recompute.features.take(cast(Any, place), cast(Any, [0] * len(place))), strict=True):
        error = float((batch[name] - torch.from_numpy(stored)).abs().max()) / float(stored.std())
        if error > 0.5:
            raise AssertionError(f"recomputed {name} features differ from the stored ones by {error:.2f} standard deviations")
        worst = max(worst, error)
    return median([worst])


def _epoch(stage: Stage, out: Path, loader: Any) -> float:
    """Seconds of one epoch of training, without validation and checkpoints."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        options = stage.options.model_copy(update={"save_steps": 0, "max_steps": 0})
        own = replace(stage, folder=Path(folder), loader=loader or stage.loader, options=options)
        around = Surroundings(load_recipe(DEMO).engine, CPU, lambda values, step: None, lambda **values: None)
        trainer = Trainer(own, around)
        trainer.forecast = None
        start = time.perf_counter()
        trainer._epoch()
        seconds = time.perf_counter() - start
        trainer.engine.destroy()
    return seconds


def _paper(options: StepBench, parts: dict[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
    """The ratio at 8 clips of 8 frames of 224 x 224 in fp32, by batch."""
    recomputing = sum(parts["paper"].values())
    found = {}
    for batch, sides in steps.items():
        step = sides["now"]["wall"] / 1000 / int(batch)
        found[batch] = {
            "ratio": median([(recomputing + step) / step]),
            "seconds_per_subsequence_from_features": median([step]),
            "seconds_per_subsequence_recomputed": median([recomputing + step]),
        }
    return found


def _table(values: dict[str, Any]) -> list[list[str]]:
    steps, stages = values["fusion_step_ms"], values["stages"]
    rows = [["recomputing takes longer by, demo's geometry", f"{values['ratio_features_vs_recompute']:g}"]]
    rows += [[f"… paper's geometry, batch {batch}", f"{ratio:,.0f}"] for batch, ratio in values["ratio_at_papers_geometry"].items()]
    for batch, sides in steps.items():
        for side in ("now", "before"):
            if side in sides:
                rows.append(
                    [f"fusion step at batch {batch}, {side}", f"{sides[side]['wall']:g} ms ({sides[side]['cpu']:g} ms of processor)"]
                )
    for stage, found in stages.items():
        for name, one in found.items():
            if name.startswith("ranks_"):
                world = name.removeprefix("ranks_")
                rows.append([f"{stage} on {world} rank(s)", f"{one['steps_per_s']:g} steps/s, {one['data_wait']:.1%} waiting for data"])
    return [["question", "found"], *rows]


if __name__ == "__main__":
    run(bench, __doc__ or "", StepBench, "step")
