"""The training loop: what it learns, and that an interrupted run ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from jmt_dist.config import EngineOptions, OptimizerOptions, ScheduleOptions, TrainOptions
from jmt_dist.data.features import FeatureLoader, FeatureSet
from jmt_dist.errors import UserError
from tests.ranks import run_ranks

CPU = torch.device("cpu")


class Net(nn.Module):
    """Has what makes restarts hard: dropout and running statistics."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.norm, self.drop = (nn.Identity(), nn.Identity()) if plain else (nn.BatchNorm1d(512), nn.Dropout(0.3))
        self.out = nn.Linear(512, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(self.drop(self.norm(x.flatten(0, 1)))).unflatten(0, x.shape[:2])
        return y


def features(samples: int = 10) -> FeatureSet:
    random = np.random.default_rng(0)
    labels = random.uniform(-1, 1, (samples, 64, 2)).astype("<f4")
    visual = random.standard_normal((samples, 8, 8, 512)).astype("<f2")
    visual[..., :2] = labels.reshape(samples, 8, 8, 2).swapaxes(1, 2) * 3
    ident = np.stack([np.arange(samples), *[np.zeros(samples)] * 3], axis=1).astype("<i4")
    return FeatureSet(visual, visual, labels, ident, tuple(range(8)))


def run(
    rank: int,
    folder: Path,
    world: int,
    stop_at: int,
    key: str = "k",
    *,
    plain: bool = False,
    zero: int = 0,
    watch: Any = None,
    on_step: Callable[[int], None] | None = None,
    validate: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Train in `folder`, with new objects throughout; with `stop_at` a stop is requested at that step and the run ends there."""
    from jmt_dist.train import ranks, stop
    from jmt_dist.train.stage import Stage, Surroundings, train
    from jmt_dist.train.watch import Watch

    ranks.start(CPU)
    stop.clear()
    made = features()
    torch.manual_seed(1)

    def validation() -> Iterator[dict[str, torch.Tensor]]:
        if rank == 0:
            yield {"visual": torch.from_numpy(made.visual[:, 0].astype(np.float32)), "va": torch.from_numpy(made.va()[:, 0])}

    def status(**values: Any) -> None:
        if on_step is not None:
            on_step(values["step"])
        if stop_at and rank == world - 1 and values["step"] == stop_at:
            stop.request("test")

    stage = Stage(
        name="toy", folder=folder, key=key, model=Net(plain), micro_batch=4 // world, seed=5,
        options=TrainOptions(
            **{"optimizer": OptimizerOptions(lr=0.02), "batch": 4, "max_epochs": 3, "patience": 9, "save_steps": 2, **options}
        ),
        loader=FeatureLoader(made, batch=4, passes=2, seed=5, rank=rank, ranks=world),
        predict=lambda net, batch, draw: (net(batch["visual"]), batch["va"]),
        validation=validation,
        validate=validate or (lambda net, batch: (net(batch["visual"]), batch["va"])),
    )  # fmt: skip
    logged: list[tuple[str, int, float]] = []
    around = Surroundings(
        EngineOptions(precision="fp32", zero=zero), CPU, lambda m, s: logged.extend((k, s, v) for k, v in m.items()), status,
        watch=watch or Watch(),
    )  # fmt: skip
    try:
        result = train(stage, around)
    except stop.Stopped:
        return {"stopped": True}
    return {"result": result, "logged": logged}


def runs(rank: int, world: int, *each: tuple[Path, int]) -> list[dict[str, Any]]:
    """Several runs, one after the other, in the same processes: starting one takes longer than a run."""
    return [run(rank, folder, world, stop_at) for folder, stop_at in each]


@pytest.mark.parametrize("world", [1, 2])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, world: int) -> None:
    # in the first epoch between saves, in the second, in the last, then to the end in other processes
    found = run_ranks(world, runs, world, (tmp_path / "whole", 0), *((tmp_path / "parts", stop_at) for stop_at in (1, 5, 11)))
    assert all(part == {"stopped": True} for rank in found for part in rank[1:])
    newest = max(path.name for path in (tmp_path / "parts/checkpoints").glob("step-*"))
    assert newest == "step-00000011"  # saved in the very step of the request, between two regular saves, on every rank
    whole = found[0][0]["result"]
    parts = run_ranks(world, run, tmp_path / "parts", world, 0)[0]["result"]
    assert parts == whole
    weights = [load_file(tmp_path / name / "best.safetensors") for name in ("whole", "parts")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert whole["score"] > 0.3 and whole["steps"] == 18
    assert json.loads((tmp_path / "whole" / "done.json").read_text())["key"] == "k"


def zero_runs(rank: int, *each: tuple[Path, int, int]) -> list[dict[str, Any]]:
    return [run(rank, folder, 2, stop_at, plain=True, zero=zero) for folder, stop_at, zero in each]


@pytest.mark.slow
def test_zero_3_trains_validates_saves_and_resumes_as_zero_0_does(tmp_path: Path) -> None:
    """Validation data are rank 0's alone; the net has no BatchNorm, whose buffers ZeRO 3 does not gather."""
    starts = [("zero0", 0, 0), ("zero3", 0, 3), ("parts", 5, 3), ("parts", 0, 3)]
    found = run_ranks(2, zero_runs, *((tmp_path / name, stop_at, zero) for name, stop_at, zero in starts))[0]
    plain_result, whole, _, parts = (each.get("result") for each in found)
    assert parts == whole and whole["steps"] == plain_result["steps"] == 18
    np.testing.assert_allclose(whole["scores"], plain_result["scores"], atol=1e-5)
    weights = [load_file(tmp_path / name / "best.safetensors") for name in ("zero0", "zero3", "parts")]
    for name in weights[0]:
        assert torch.equal(weights[1][name], weights[2][name])
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=0)


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(tmp_path: Path) -> None:
    whole = run_ranks(1, runs, 1, (tmp_path / "whole", 0), (tmp_path / "parts", 11))[0][0]["result"]
    damaged = newest(tmp_path / "parts") / "rank-00000.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert run_ranks(1, run, tmp_path / "parts", 1, 0)[0]["result"] == whole


def refusals(rank: int, foreign: Path, torn: Path) -> list[str]:
    """What is said of checkpoints with another key, and of one whose files are all cut short."""
    run(rank, foreign, 1, 5)
    run(rank, torn, 1, 1)
    for folder in (torn / "checkpoints").glob("step-*"):
        (folder / "progress.json").write_bytes(b"")
    found = []
    for folder, key in ((foreign, "other"), (torn, "k")):
        try:
            run(rank, folder, 1, 0, key)
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


def test_foreign_checkpoints_and_a_truncated_only_one_stop_the_job_instead_of_starting_anew(tmp_path: Path) -> None:
    foreign, torn = run_ranks(1, refusals, tmp_path / "foreign", tmp_path / "torn")[0]
    assert "belongs to another recipe" in foreign and "cut short" in torn


def twice(rank: int, folder: Path) -> list[Any]:
    found = []
    for _ in range(2):
        found += [run(rank, folder, 1, 0), (folder / "best.safetensors").stat().st_mtime_ns]
    return found


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first, before, again, after = run_ranks(1, twice, tmp_path)[0]
    assert again["result"] == first["result"] and again["logged"] == [] and after == before


def plain(rank: int, world: int, folder: Path, stop_at: int, zero: int = 0) -> Any:
    """One run of the net whose result does not depend on how a batch is divided."""
    try:
        return run(rank, folder, world, stop_at, plain=True, zero=zero)
    except UserError as error:
        return str(error)


def test_another_number_of_ranks_goes_on_without_losing_or_repeating_a_sample(tmp_path: Path) -> None:
    whole = run_ranks(1, plain, 1, tmp_path / "whole", 0)[0]["result"]
    run_ranks(2, plain, 2, tmp_path / "parts", 4)
    parts = run_ranks(1, plain, 1, tmp_path / "parts", 0)[0]["result"]
    assert parts["steps"] == whole["steps"] == 18
    np.testing.assert_allclose(parts["scores"], whole["scores"], atol=1e-5)
    weights = [load_file(tmp_path / name / "best.safetensors") for name in ("whole", "parts")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=0)


def test_another_number_of_ranks_is_refused_where_zero_has_divided_the_optimiser(tmp_path: Path) -> None:
    run_ranks(2, plain, 2, tmp_path, 4, 1)
    assert "written by 2 ranks under engine.zero=1 and this job has 1" in run_ranks(1, plain, 1, tmp_path, 0, 1)[0]


def scripted(noises: list[float]) -> Any:
    """A validation that scores as planned: the less noise, the better."""
    left = iter(noises)

    def validate(net: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(batch["va"].shape, generator=torch.Generator().manual_seed(0))
        return batch["va"] + next(left) * noise, batch["va"]

    return validate


def patience(rank: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    noises = [0.5, 0.1, 0.3, 0.4, 0.05, 0.05]
    limits = {"max_epochs": 6, "patience": 2, "keep": 3}
    stopped = run(rank, folder / "stopped", 1, 0, validate=scripted(noises), **limits)
    return stopped, run(rank, folder / "two", 1, 0, validate=scripted(noises), **{**limits, "max_epochs": 2})


def test_early_stopping_keeps_the_best_weights_and_the_newest_checkpoints(tmp_path: Path) -> None:
    stopped, two = (found["result"] for found in run_ranks(1, patience, tmp_path)[0])
    assert stopped["epochs"] == 4 and len(stopped["scores"]) == 4  # two epochs without a better score: the fifth is never seen
    assert stopped["best_step"] == 12 == 2 * 6 and stopped["score"] == two["score"] == max(sum(row[1:]) / 2 for row in stopped["scores"])
    best, wanted = (load_file(tmp_path / name / "best.safetensors") for name in ("stopped", "two"))
    assert all(torch.equal(best[name], wanted[name]) for name in wanted)
    names = sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir())
    assert names == ["step-00000020", "step-00000022", "step-00000024"]


def scheduled(rank: int, folder: Path) -> list[tuple[str, int, float]]:
    schedule = ScheduleOptions(name="cosine", warmup_steps=8)
    logged: list[tuple[str, int, float]] = run(rank, folder, 1, 0, schedule=schedule, max_steps=40, max_epochs=9)["logged"]
    return logged


def test_the_rate_warms_up_and_falls_as_the_schedule_says(tmp_path: Path) -> None:
    rates = {step: value for name, step, value in run_ranks(1, scheduled, tmp_path)[0] if name == "toy/train/lr"}
    assert rates.keys() == {10, 20, 30, 40}
    for step, value in rates.items():  # of the step that comes next: steps are counted from 0
        assert value == pytest.approx(0.02 * 0.5 * (1 + math.cos(math.pi * (step - 8) / 32)), abs=1e-9)


def broken(rank: int, folder: Path) -> list[str]:
    """A validation that yields NaN, and a training in which the net does from its fifth step on."""
    forward, steps = Net.forward, []

    def poisoned(self: Net, x: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        y: torch.Tensor = forward(self, x)
        return y * float("nan") if len(steps) > 5 else y  # the first call is the forecast's

    found = []
    for name, validate in (("validation", lambda net, batch: (batch["va"] * float("nan"), batch["va"])), ("training", None)):
        if name == "training":
            Net.forward = poisoned  # type: ignore[method-assign]
        try:
            run(rank, folder / name, 1, 0, validate=validate)
        except UserError as error:
            found.append(str(error))
        finally:
            Net.forward = forward  # type: ignore[method-assign]
        found.append(" ".join(sorted(path.name for path in (folder / name / "checkpoints").iterdir())))
    return found


def test_scores_and_losses_that_are_no_numbers_stop_the_job_and_touch_nothing(tmp_path: Path) -> None:
    score, kept, loss, before = run_ranks(1, broken, tmp_path)[0]
    assert "the validation score after step 6 is nan" in score and kept == "step-00000004 step-00000006"
    assert "the loss is nan at step 5, samples" in loss and "(unit, segment, phase) [(" in loss and before == "step-00000002 step-00000004"
