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
from tests.data.test_features import features, flip, tars, write
from tests.data.tree import write_unit
from tests.ranks import run_ranks, start_ranks

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
AUDIO = ("stages=[visual,audio]", "audio.batch=4", "audio.max_steps=1", "audio.validation_offsets=[1]")
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


def both(rank: int, folder: Path, out: str) -> str:
    return visual(rank, folder, out, None, *AUDIO)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of the visual and audio stages of two ranks that nothing befalls."""
    assert run_ranks(2, both, place, "whole") == ["", ""]
    return weights(place / "whole")


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: load_file(path) for path in (out / "official").glob("*/best.safetensors")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


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


@pytest.mark.parametrize("where", ["_train", "finetuned_features"])
def test_out_of_memory_in_finetuning_names_the_options_of_finetuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Not those of the fusion stage, of which it is a part; and where it stores features, those of features."""
    from jmt_dist.recipe import load_recipe, load_site
    from jmt_dist.train import fold
    from jmt_dist.train.plan import FoldPlan

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(fold, "_train", lambda *_: None)
    monkeypatch.setattr(fold, where, full)
    made = load_recipe(RECIPE, ["finetune=true", "finetuning.batch=12", "fusion.batch=64", "features.batch=6"])
    nothing: Any = None
    plan = FoldPlan(made, load_site(None), "official", tmp_path, torch.device("cpu"), nothing, {}, nothing, keys={"features": "0"})
    with pytest.raises(UserError) as caught:
        fold._finetune(plan)
    if where == "_train":
        assert caught.value.sentence.startswith("official finetuning: out of memory on cpu with 12 subsequences per rank and micro-batch")
        assert caught.value.remedy == "Try finetuning.accumulation=2: micro-batches of 6, the step still over 12."
    else:
        assert caught.value.sentence == "official features: out of memory on cpu with features.batch=6"
        assert caught.value.remedy == "Try features.batch=3 (it changes no result)."
    assert fold.explain(caught.value, plan, "fusion") is caught.value  # the stage around it says nothing else


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
def test_a_shard_garbled_in_mid_epoch_stops_all_ranks_and_costs_nothing_after_repair(
    place: Path, tmp_path: Path, undisturbed: dict[str, dict[str, torch.Tensor]]
) -> None:
    kept = copied(place, tmp_path)
    found = run_ranks(2, harmed, tmp_path, "parts")
    assert all("shard " in said and "is damaged: its bytes are not those that were packed" in said for said in found)
    assert all("shards/verify_shards.py" in said and "goes on where it stopped" in said for said in found)
    newest = max((tmp_path / "parts/official/visual/checkpoints").iterdir())
    assert newest.name >= "step-00000002" and not (tmp_path / "parts/official/visual/done.json").exists()
    assert json.loads((tmp_path / "parts/official/status.json").read_text())["step"] >= 2
    for path, data in kept.items():
        path.write_bytes(data)
    assert run_ranks(2, calm, tmp_path, "parts") == ["", ""]
    assert same(weights(tmp_path / "parts")["visual"], undisturbed["visual"])


def removed(rank: int, folder: Path, out: str, mmap: str) -> str:
    def harm(step: int) -> None:
        if step == 2 and rank == 0:
            for tar in (folder / "shards").glob("*.tar"):
                tar.unlink()

    return visual(rank, folder, out, harm, *AUDIO, f"data.mmap={mmap}")


@pytest.mark.slow
@pytest.mark.parametrize("mmap", ["true", "false"])
def test_a_shard_removed_in_mid_epoch_is_read_while_it_is_open_and_then_named(
    place: Path, tmp_path: Path, undisturbed: dict[str, dict[str, torch.Tensor]], mmap: str
) -> None:
    """An open file outlives its name: what reads it goes on as if nothing had been, and what opens it next stops every rank.

    Mapped files stay open for the whole stage, its validation included; others for the epoch.
    """
    kept = copied(place, tmp_path)
    found = run_ranks(2, removed, tmp_path, "parts", mmap)
    assert all("shard " in said and " is missing. Restore or make it again" in said for said in found), found
    official = tmp_path / "parts/official"
    if mmap == "true":
        assert same(weights(tmp_path / "parts")["visual"], undisturbed["visual"]) and not (official / "audio/done.json").exists()
    else:
        assert max((official / "visual/checkpoints").iterdir()).name >= "step-00000002" and not (official / "visual/done.json").exists()
        again = run_ranks(2, both, tmp_path, "parts")
        assert all("is missing" in said and "Pack what is missing" in said for said in again), again
    for path, data in kept.items():
        path.write_bytes(data)
    assert run_ranks(2, both, tmp_path, "parts") == ["", ""]
    ended = weights(tmp_path / "parts")
    assert all(same(ended[stage], undisturbed[stage]) for stage in ("visual", "audio"))


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


def test_damaged_features_are_named_unless_they_are_of_other_settings(tmp_path: Path) -> None:
    """Of those nothing is read: what has failed has another reason."""
    from jmt_dist.data.shards import ShardSet
    from jmt_dist.recipe import load_recipe, load_site
    from jmt_dist.train.plan import FoldPlan
    from jmt_dist.train.trouble import damage, explain

    nothing: Any = None
    parts = {"train": ShardSet((), (), 0, "", "")}
    plan = FoldPlan(load_recipe(RECIPE), load_site(None), "official", tmp_path, torch.device("cpu"), nothing, parts, nothing)
    folder = tmp_path / "features"
    write(folder, features(6, (0,)), 2)
    (folder / "done.json").write_text(json.dumps({"key": "own"}))
    plan.keys["features"] = "own"
    assert damage(plan) is None
    path = tars(folder)[0]
    flip(path, 5000)
    found = damage(plan)
    assert found is not None and found.sentence == f"{path} is damaged: its bytes are not those that were stored"
    assert found.remedy.startswith("Run the features stage of this fold again")
    assert explain(found, plan, "fusion") is found
    plan.keys["features"] = "other"
    assert damage(plan) is None
    del plan.keys["features"]  # in a stage before them
    assert damage(plan) is None
