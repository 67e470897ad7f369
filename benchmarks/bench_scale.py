"""How long the paper's recipe takes on 1 to 64 GPUs, from measured step, data and all-reduce sizes; and how fast 1,000 tasks submit.

    python benchmarks/bench_scale.py --json benchmarks/results                       measure here, then the model's table
    python benchmarks/bench_scale.py step_visual_ms=70 step_audio_ms=18 …            measured elsewhere, on one GPU

The table is a model, not a measurement: its formulas and all its inputs are in the output. What is measured here (parameters, bytes,
steps; on a GPU the steps' times) says `measured`, what is taken from data sheets or from words says so. Submission is measured against the
SLURM whose commands are on PATH and whose SLURM_CONF is set (slurm/minicluster/up), with one sbatch call for all tasks.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from common import REPOSITORY, Result, median, run
from pydantic import Field

from jmt_dist.config import Options, Recipe

FORMULAS = {
    "ranks": "largest number of ranks <= GPUs of a fold over which the stage's batch divides",
    "steps": "epochs * ceil(samples * offsets_per_epoch / batch)",
    "compute": "step_ms(batch) / ranks, not below floor_ms (launches and the optimiser do not divide)",
    "allreduce": "2 (ranks - 1) / ranks * gradient_bytes / bandwidth + 2 (ranks - 1) * latency; half of it behind the backward pass",
    "data": "samples per step / ranks * cpu_ms_per_sample / cores_per_gpu; hidden behind the step: step = max(compute + allreduce, data)",
    "validation": "of the backbones, after each epoch: samples / batch * max(compute / 3, data), since a forward pass is a third of a step",
    "hours": "sum over stages of steps * step + epochs * validation; + features: samples * 8 * forward_ms / ranks; + start_minutes",
    "efficiency": "hours on one GPU / (GPUs * hours), of the same fold",
    "six folds": "folds run side by side on the GPUs: the best of all divisions of the GPUs into equal groups",
}


class ScaleOptions(Options):
    """Inputs; those left at 0 are measured where this machine can, else taken from the assumptions in the output."""

    samples: Annotated[int, Field(gt=0)] = Field(37_600, description="of a fold's training and validation part (rehearse_full_scale.py)")
    train_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.745, description="of them in the training part: 28,000")
    visual_epochs: Annotated[float, Field(gt=0)] = Field(15, description="epochs until early stopping (at most 50)")
    audio_epochs: Annotated[float, Field(gt=0)] = Field(15, description="epochs until early stopping (at most 50)")
    fusion_epochs: Annotated[float, Field(gt=0)] = Field(5, description="epochs of the fusion")
    step_visual_ms: Annotated[float, Field(ge=0)] = Field(0, description="a step of the paper's batch of 8 subsequences on one GPU")
    step_audio_ms: Annotated[float, Field(ge=0)] = Field(0, description="a step of the paper's batch of 64 subsequences on one GPU")
    step_fusion_ms: Annotated[float, Field(ge=0)] = Field(0, description="a step of the paper's batch of 2 subsequences on one GPU")
    floor_ms: Annotated[float, Field(ge=0)] = Field(8, description="least time of a step, whatever the batch")
    cpu_ms_per_sample: Annotated[float, Field(gt=0)] = Field(16.6, description="processor time to load a sample (results/loader_*.json)")
    cores_per_gpu: Annotated[int, Field(gt=0)] = Field(8, description="cores that load for one GPU")
    bandwidth_gb_s: Annotated[float, Field(gt=0)] = Field(100, description="all-reduce bandwidth within a node, GB/s")
    network_gb_s: Annotated[float, Field(gt=0)] = Field(20, description="all-reduce bandwidth between nodes, GB/s")
    latency_us: Annotated[float, Field(ge=0)] = Field(15, description="latency of one hop")
    gpus_per_node: Annotated[int, Field(gt=0)] = Field(4, description="GPUs of a node")
    start_minutes: Annotated[float, Field(ge=0)] = Field(2, description="a job's start: imports, NCCL, staging of what is not there")
    tasks: Annotated[int, Field(ge=0)] = Field(1000, description="tasks of the sweep that is submitted; 0: none")
    rounds: Annotated[int, Field(gt=0)] = Field(3, description="submissions measured")


def bench(options: ScaleOptions, out: Path) -> Result:
    """Sizes, then the model, then the submission."""
    sizes = measure_sizes()
    inputs, origin = steps_of(options)
    rows = [model(options, inputs, sizes, gpus) for gpus in (1, 2, 4, 8, 16, 32, 64)]
    submission = submit(options, out) if options.tasks else {}
    table = [("GPUs", "one fold: hours", "efficiency", "six folds: hours", "folds side by side", "efficiency")]
    for row in rows:
        cells = (row["gpus"], f"{row['fold_hours']:.1f}", f"{row['fold_efficiency']:.2f}")
        table.append((*map(str, cells), f"{row['six_hours']:.1f}", str(row["side_by_side"]), f"{row['six_efficiency']:.2f}"))
    if submission:
        text = submission.get("skipped") or (
            f"{submission['seconds']} s ({submission['processor_seconds']} s of a core), {submission['sbatch_calls']} sbatch call(s)"
        )
        table.append((f"submitting {options.tasks} tasks", text, "", "", "", ""))
    values = {"formulas": FORMULAS, "inputs": inputs, "origin": origin, "sizes": sizes, "table": rows, "submission": submission}
    return Result(values, table)


def measure_sizes() -> dict[str, Any]:
    """Gradients of each stage in bytes: parameters of the very modules that are trained, fp32."""
    from jmt_dist.model.heads import AudioModel, VisualModel
    from jmt_dist.model.zoo import make_fusion

    recipe = Recipe()
    modules = {
        "visual": VisualModel(recipe.visual.model_copy(update={"weights": "none"})),
        "audio": AudioModel(recipe.audio.model_copy(update={"weights": "none"})),
        "fusion": make_fusion(recipe.fusion),
    }
    counts = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in modules.items()}
    return {name: {"gradient_bytes": 4 * count, "origin": "measured"} for name, count in counts.items()}


def steps_of(options: ScaleOptions) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of a step on one GPU by stage, and where each number is from."""
    # of one H100-class GPU in bf16: a step of 8 subsequences of 224x224 is 8 x 3.88 TFLOP (docs/performance.md), at 35 % of 990 TFLOP/s
    # 90 ms; the others are bound by launches
    assumed = {"visual": 90.0, "audio": 30.0, "fusion": 8.0}
    inputs, origin = {}, {}
    for stage, default in assumed.items():
        given = float(getattr(options, f"step_{stage}_ms"))
        inputs[stage] = given or default
        origin[stage] = "given" if given else "assumed: no GPU has been measured yet"
    return inputs, origin


def model(options: ScaleOptions, inputs: dict[str, float], sizes: dict[str, Any], gpus: int) -> dict[str, Any]:
    """One row of the table: a fold on all GPUs, and six folds on the same GPUs."""
    one = fold_hours(options, inputs, sizes, 1)["total"]
    alone = fold_hours(options, inputs, sizes, gpus)
    best = min((-(-6 // n) * fold_hours(options, inputs, sizes, gpus // n)["total"], n) for n in range(1, 7) if gpus >= n)
    row = {"gpus": gpus, "fold_hours": alone["total"], "stages": alone, "fold_efficiency": one / (gpus * alone["total"])}
    return row | {"six_hours": best[0], "side_by_side": best[1], "six_efficiency": 6 * one / (gpus * best[0])}


def fold_hours(options: ScaleOptions, inputs: dict[str, float], sizes: dict[str, Any], gpus: int) -> dict[str, float]:
    """Hours of each stage of one fold on `gpus` GPUs."""
    from jmt_dist.train.division import usable_ranks

    recipe, train = Recipe(), options.samples * options.train_share
    found: dict[str, float] = {}
    for stage, epochs in (("visual", options.visual_epochs), ("audio", options.audio_epochs), ("fusion", options.fusion_epochs)):
        batch, passes = getattr(recipe, stage).batch, getattr(recipe, stage).offsets_per_epoch
        ranks = usable_ranks(batch, gpus)
        compute = max(inputs[stage] / ranks, options.floor_ms if stage != "fusion" else inputs[stage])
        reduce = allreduce_ms(options, sizes[stage]["gradient_bytes"], ranks)
        data = 0.0 if stage == "fusion" else batch / ranks * options.cpu_ms_per_sample / options.cores_per_gpu
        held = 0.0 if stage == "fusion" else (options.samples - train) / batch * max(compute / 3, data)
        found[stage] = epochs * (-(-train * passes // batch) * max(compute + reduce / 2, data) + held) / 3.6e6
    forward = (inputs["visual"] / 8 + inputs["audio"] / 64) / 3  # a forward pass is about a third of a step
    found["features"] = options.samples * max(8 * forward, options.cpu_ms_per_sample / options.cores_per_gpu) / gpus / 3.6e6
    found["start"] = options.start_minutes / 60
    return {**found, "total": sum(found.values())}


def allreduce_ms(options: ScaleOptions, size: int, ranks: int) -> float:
    """A ring's time for `size` bytes."""
    if ranks == 1:
        return 0.0
    speed = options.bandwidth_gb_s if ranks <= options.gpus_per_node else options.network_gb_s
    return 2 * (ranks - 1) / ranks * size / (speed * 1e6) + 2 * (ranks - 1) * options.latency_us / 1e3


def submit(options: ScaleOptions, out: Path) -> dict[str, Any]:
    """Submit a sweep to the SLURM at hand, held, and cancel it again; seconds of the whole program, and of its sbatch calls."""
    if shutil.which("sbatch") is None or subprocess.run(["sinfo", "-h"], capture_output=True).returncode:
        return {"skipped": "there is no SLURM here: run slurm/minicluster/up and source what it names"}
    sys.path.insert(0, str(REPOSITORY))
    from tests.cluster.conftest import write_shards  # no job runs: manifest, folds and indexes are all a submission reads

    shutil.rmtree(out / "sweep", ignore_errors=True)
    (out / "sweep").mkdir(parents=True)
    shards = write_shards(out / "sweep" / "shards")
    (out / "sweep" / "recipe.yaml").write_text("name: bench\nvisual: {weights: none}\naudio: {weights: none}\nstages: [fusion, evaluate]\n")
    variants = options.tasks // 5
    (out / "sweep" / "sweep.yaml").write_text(
        f"recipe: recipe.yaml\nsamples: {variants}\nrandom:\n"
        "  fusion.optimizer.lr: {low: 1.0e-6, high: 1.0, log: true}\n  seed: {low: 0, high: 1000000}\n"
    )
    (out / "sweep" / "site.yaml").write_text("name: bench\nexecutor: slurm\ndevice: cpu\npartition: mini\nextra: {hold: ''}\n")
    # a door before sbatch that counts and times its calls
    real = shutil.which("sbatch")
    door = out / "sweep" / "bin" / "sbatch"
    door.parent.mkdir()
    log = out / "sweep" / "calls"
    door.write_text(f'#!/bin/bash\nbegan=$(date +%s.%N)\n"{real}" "$@"\ncode=$?\necho "$began $(date +%s.%N)" >>"{log}"\nexit $code\n')
    door.chmod(0o755)
    seconds, processor, sbatch = [], [], []
    for number in range(options.rounds):
        log.unlink(missing_ok=True)
        folder = out / "sweep" / f"run-{number}"
        words = [f"sweep={out}/sweep/sweep.yaml", f"site={out}/sweep/site.yaml", f"data.shards={shards}", f"out={folder}", "compare=false"]
        command = [sys.executable, "launch/submit_sweep.py", *words, "folds=[fold-1,fold-2,fold-3,fold-4,fold-5]"]
        environment = {**os.environ, "PATH": f"{door.parent}{os.pathsep}{os.environ['PATH']}"}
        began, used = time.monotonic(), children_seconds()
        answer = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        seconds.append(time.monotonic() - began)
        processor.append(children_seconds() - used)
        if answer.returncode:
            raise RuntimeError(answer.stdout + answer.stderr)
        calls = [line.split() for line in log.read_text().splitlines()]
        sbatch += [float(end) - float(start) for start, end in calls]
        known = subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True).stdout.split()
        cancel = subprocess.run([sys.executable, "launch/cancel_jobs.py", f"out={folder}"], cwd=REPOSITORY, capture_output=True, text=True)
        print(f"round {number + 1}: {seconds[-1]:.1f} s, {len(calls)} sbatch call(s), {len(known)} tasks queued")
        print(cancel.stdout.splitlines()[-2])
        tasks = len(json.loads(next((folder / "jobs").glob("*/variants/tasks.json")).read_text())["tasks"])
        if len(known) < tasks:
            raise RuntimeError(f"{tasks} tasks were submitted and SLURM knows {len(known)}")
    found = {"tasks": tasks, "seconds": median(seconds), "rounds": seconds, "processor_seconds": median(processor)}
    return {**found, "sbatch_calls": len(calls), "sbatch_seconds": median(sbatch), "load_average": os.getloadavg()[0]}


def children_seconds() -> float:
    """Processor time of the children so far: what a submission takes on a machine that is not shared."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    run(bench, __doc__, ScaleOptions, "scale", ["submitit"])
