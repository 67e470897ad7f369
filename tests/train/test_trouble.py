"""Memory that runs out and shards that turn unreadable while a fold trains: what is said, and that nothing is lost."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jmt_dist.config import PackOptions
from jmt_dist.data.pack import pack
from jmt_dist.errors import UserError
from tests.data.tree import write_unit
from tests.ranks import run_ranks, start_ranks

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
LEFT = 300 << 20  # bytes of address space left when memory runs out


def visual(rank: int, folder: Path, out: str, on_step: Callable[[int], None] | None = None, *words: str) -> str:
    """The visual stage of a fold of tiny shards, a checkpoint at each of its 6 steps; returns the UserError it ends with, if any."""
    from jmt_dist.recipe import load_recipe, load_site
    from jmt_dist.train.fold import run_fold
    from jmt_dist.train.report import Status

    progress = Status.progress

    def step(self: Status, **values: Any) -> None:
        progress(self, **values)
        if on_step is not None and values["stage"] == "visual" and values["epoch"] == 0:
            on_step(values["step"])

    Status.progress = step  # type: ignore[method-assign]
    small = ["stages=[visual]", f"data.shards={folder}/shards", "data.shuffle_buffer=1", "data.prefetch=1", "visual.size=16"]
    small += ["visual.batch=4", "visual.save_steps=1", "visual.max_steps=6", "visual.max_epochs=3", "visual.validation_offsets=[1]"]
    try:
        run_fold(load_recipe(RECIPE, [*small, *words]), load_site(None), "official", folder / out)
    except UserError as error:
        return str(error)
    finally:
        Status.progress = progress  # type: ignore[method-assign]
    return ""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trouble")
    for k in range(7):
        write_unit(folder / "tree", f"u{k}", 70, k, "Train_Set" if k < 5 else "Validation_Set")
    pack(PackOptions(source=str(folder / "tree"), out=str(folder / "shards"), workers=1, samples_per_shard=4), say=lambda line: None)
    return folder


def starved(rank: int, folder: Path) -> tuple[str, str, str]:
    """The second step takes more memory than the process may have: the allocation fails for real."""
    from jmt_dist.model.heads import VisualModel

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    forward = VisualModel.forward

    def hungry(self: VisualModel, x: torch.Tensor) -> Any:
        if limited:
            torch.empty(LEFT, dtype=torch.float32).fill_(float(x.sum()))
        return forward(self, x)

    limited: list[int] = []

    def limit(step: int) -> None:
        if step == 1 and not limited:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + LEFT, hard))
            limited.append(step)

    VisualModel.forward = hungry  # type: ignore[method-assign,assignment]
    said = visual(rank, folder, "memory", limit)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    limited.clear()
    kept = sorted(path.name for path in (folder / "memory/official/visual/checkpoints").iterdir())[-1]
    return said, kept, visual(rank, folder, "memory", None, "visual.accumulation=2")


@pytest.mark.slow
def test_out_of_memory_names_the_accumulation_to_try_which_then_works(place: Path) -> None:
    [(said, kept, then)] = run_ranks(1, starved, place)
    assert "official visual: out of memory on cpu with 4 subsequences per rank and micro-batch" in said
    assert "Try visual.accumulation=2: micro-batches of 2, the step still over 4." in said
    assert kept == "step-00000001" and then == ""


def garble(path: Path) -> None:
    """Zeros over all pictures, in place: what is mapped already changes too."""
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(bytes(path.stat().st_size - 4096))


def harmed(rank: int, folder: Path, out: str) -> str:
    def harm(step: int) -> None:
        if step == 2 and rank == 0:
            for tar in sorted((folder / "shards").glob("*.tar")):
                garble(tar)

    return visual(rank, folder, out, harm)


def calm(rank: int, folder: Path, out: str) -> str:
    return visual(rank, folder, out)


def copied(place: Path, folder: Path) -> dict[Path, bytes]:
    import shutil

    shutil.copytree(place / "shards", folder / "shards")
    return {path: path.read_bytes() for path in (folder / "shards").glob("*.tar")}


@pytest.mark.slow
def test_a_shard_garbled_in_mid_epoch_stops_all_ranks_and_costs_nothing_after_repair(place: Path, tmp_path: Path) -> None:
    kept = copied(place, tmp_path)
    assert run_ranks(2, calm, tmp_path, "whole") == ["", ""]
    found = run_ranks(2, harmed, tmp_path, "parts")
    assert all("shard " in said and "is damaged: its bytes are not those that were packed" in said for said in found)
    assert all("shards/verify_shards.py" in said and "goes on where it stopped" in said for said in found)
    newest = max((tmp_path / "parts/official/visual/checkpoints").iterdir())
    assert newest.name >= "step-00000002" and not (tmp_path / "parts/official/visual/done.json").exists()
    assert json.loads((tmp_path / "parts/official/status.json").read_text())["step"] >= 2
    for path, data in kept.items():
        path.write_bytes(data)
    assert run_ranks(2, calm, tmp_path, "parts") == ["", ""]
    whole, parts = (load_file(tmp_path / out / "official/visual/best.safetensors") for out in ("whole", "parts"))
    assert all(whole[name].equal(parts[name]) for name in whole)


def shortened(rank: int, folder: Path) -> str:
    def harm(step: int) -> None:
        if step == 2 and rank == 0:
            for tar in sorted((folder / "shards").glob("*.tar")):
                with tar.open("r+b") as file:
                    file.truncate(2048)

    return visual(rank, folder, "out", harm)


@pytest.mark.slow
def test_a_shard_cut_short_while_it_is_mapped_is_named_and_ends_every_rank(place: Path, tmp_path: Path) -> None:
    kept = copied(place, tmp_path)
    codes = start_ranks(2, str(tmp_path), shortened, tmp_path)
    said = [torch.load(path) for path in tmp_path.glob("*.pt")]
    said += [json.loads(path.read_text())["reason"] for path in (tmp_path / "out/official/errors").glob("*.json")]
    assert said and all("shard " in line and "has 2048 bytes, not the " in line for line in said), said
    assert all(code in (0, 1) for code in codes)  # no rank hangs, and none dies without a word
    for path, data in kept.items():
        path.write_bytes(data)
    assert run_ranks(2, calm, tmp_path, "out") == ["", ""]
