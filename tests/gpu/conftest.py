"""Every test of this folder runs on the CPU (its twin, in the slow tier) and on a GPU (mark `gpu`)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("torch finds no CUDA GPU here: run these tests where there is one")
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")
