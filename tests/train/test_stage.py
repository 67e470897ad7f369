"""The training loop: what it learns, and that an interrupted run ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from jmt_dist.config import EngineOptions, OptimizerOptions, TrainOptions
from jmt_dist.data.features import FeatureLoader, FeatureSet
from jmt_dist.errors import UserError
from tests.ranks import run_ranks

CPU = torch.device("cpu")


class Net(nn.Module):
    """Has what makes restarts hard: dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(512), nn.Dropout(0.3), nn.Linear(512, 2)

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


def run(rank: int, folder: Path, world: int, stop_at: int, key: str = "k", epochs: int = 3) -> dict[str, Any]:
    """Train in `folder`; with `stop_at` a stop is requested at that step and the run ends there."""
    from jmt_dist.train import ranks, stop
    from jmt_dist.train.stage import Stage, Surroundings, train

    ranks.start(CPU)
    stop.clear()
    made = features()
    torch.manual_seed(1)

    def validation() -> Iterator[dict[str, torch.Tensor]]:
        if rank == 0:
            yield {"visual": torch.from_numpy(made.visual[:, 0].astype(np.float32)), "va": torch.from_numpy(made.va()[:, 0])}

    def status(**values: Any) -> None:
        if stop_at and rank == world - 1 and values["step"] == stop_at:
            stop.request("test")

    stage = Stage(
        name="toy", folder=folder, key=key, model=Net(), micro_batch=4 // world, seed=5,
        options=TrainOptions(optimizer=OptimizerOptions(lr=0.02), batch=4, max_epochs=epochs, patience=9, save_steps=2),
        loader=FeatureLoader(made, batch=4, passes=2, seed=5, rank=rank, ranks=world),
        predict=lambda net, batch, draw: (net(batch["visual"]), batch["va"]),
        validation=validation,
        validate=lambda net, batch: (net(batch["visual"]), batch["va"]),
    )  # fmt: skip
    logged: list[tuple[str, int, float]] = []
    around = Surroundings(EngineOptions(precision="fp32"), CPU, lambda m, s: logged.extend((k, s, v) for k, v in m.items()), status)
    try:
        result = train(stage, around)
    except stop.Stopped:
        return {"stopped": True}
    return {"result": result, "logged": logged}


@pytest.mark.parametrize("world", [1, 2])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, world: int) -> None:
    whole = run_ranks(world, run, tmp_path / "whole", world, 0)[0]["result"]
    for stop_at in (1, 5, 11):  # in the first epoch between saves, in the second, in the last
        assert all(found == {"stopped": True} for found in run_ranks(world, run, tmp_path / "parts", world, stop_at))
    parts = run_ranks(world, run, tmp_path / "parts", world, 0)[0]["result"]
    assert parts == whole
    weights = [load_file(tmp_path / name / "best.safetensors") for name in ("whole", "parts")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert whole["score"] > 0.3 and whole["steps"] == 18
    assert json.loads((tmp_path / "whole" / "done.json").read_text())["key"] == "k"


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(tmp_path: Path) -> None:
    whole = run_ranks(1, run, tmp_path / "whole", 1, 0)[0]["result"]
    run_ranks(1, run, tmp_path / "parts", 1, 11)
    damaged = newest(tmp_path / "parts") / "rank-00000.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert run_ranks(1, run, tmp_path / "parts", 1, 0)[0]["result"] == whole


def refusal(rank: int, folder: Path, key: str) -> str:
    try:
        run(rank, folder, 1, 0, key)
    except UserError as error:
        return str(error)
    return ""


def test_checkpoints_of_another_recipe_stop_the_job(tmp_path: Path) -> None:
    run_ranks(1, run, tmp_path, 1, 5)
    assert "belongs to another recipe" in run_ranks(1, refusal, tmp_path, "other")[0]


def test_a_truncated_only_checkpoint_stops_the_job_instead_of_starting_anew(tmp_path: Path) -> None:
    run_ranks(1, run, tmp_path, 1, 1)
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        (folder / "progress.json").write_bytes(b"")
    assert "cut short" in run_ranks(1, refusal, tmp_path, "k")[0]


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first = run_ranks(1, run, tmp_path, 1, 0)[0]
    before = (tmp_path / "best.safetensors").stat().st_mtime_ns
    again = run_ranks(1, run, tmp_path, 1, 0)[0]
    assert again["result"] == first["result"] and again["logged"] == []
    assert (tmp_path / "best.safetensors").stat().st_mtime_ns == before
