"""Which weights a stage leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from jmt_dist.evaluate.metric import scores
from tests.ranks import run_ranks
from tests.train.test_stage import Net, features, run


def trained(rank: int, folder: Path) -> dict[str, Any]:
    return run(rank, folder, 1, 0, plain=True)["result"]


def test_the_best_weights_are_those_of_the_best_epoch(tmp_path: Path) -> None:
    """Loaded again, they score what the stage says was best: the mean of both CCC, by the metric and not the loss."""
    result = run_ranks(1, trained, tmp_path)[0]
    by_step = {int(step): (valence + arousal) / 2 for step, valence, arousal in result["scores"]}
    assert max(by_step.values()) == result["score"] == by_step[result["best_step"]]
    assert result["best_step"] > min(by_step)  # it went on learning after the first best epoch, and the weights with it
    net, made = Net(plain=True), features()
    net.load_state_dict(load_file(tmp_path / "best.safetensors"))
    with torch.no_grad():
        found = net(torch.from_numpy(made.visual[:, 0].astype(np.float32))).flatten(0, 1).numpy()
    score = scores(found, made.va()[:, 0].reshape(-1, 2))
    assert abs((score.valence + score.arousal) / 2 - result["score"]) < 1e-5
    assert abs(score.valence - score.arousal) > 1e-3  # so that a mean of one of them twice would show
