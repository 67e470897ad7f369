"""Checkpoints where the disk is full, on one of two ranks; and damaged in every way a file can be."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from jmt_dist.errors import UserError
from tests.ranks import run_ranks
from tests.train import test_stage

FULL = (4, 8)  # the disk is full from the report of this step to that of the other: the saves of steps 4, 6 and 8


def on_steps(begin: Callable[[], None], end: Callable[[], None]) -> Callable[[int], None]:
    """Calls `begin` and `end` at the first report of these steps."""
    left = {FULL[0]: begin, FULL[1] + 1: end}
    return lambda step: left.pop(step, lambda: None)()


def limited(rank: int, folder: Path, victim: int, zero: int) -> Any:
    """One rank may not write files beyond 2 kB for a while: the system refuses as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        if rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    with redirect_stdout(StringIO()) as said:
        found = test_stage.run(rank, folder, 2, 0, plain=True, zero=zero, on_step=on_steps(lambda: limit(2048), lambda: limit(soft)))
    return found, sorted(path.name for path in (folder / "checkpoints").iterdir()), said.getvalue()


def undisturbed(rank: int, folder: Path, zero: int) -> Any:
    return test_stage.run(rank, folder, 2, 0, plain=True, zero=zero)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "zero"), [(0, 0), (1, 0), (1, 1)])
def test_a_rank_that_cannot_write_costs_a_checkpoint_and_nothing_else(tmp_path: Path, victim: int, zero: int) -> None:
    whole = run_ranks(2, undisturbed, tmp_path / "whole", zero)[0]["result"]
    (found, names, said), _ = run_ranks(2, limited, tmp_path / "parts", victim, zero)
    assert found["result"] == whole and names == ["step-00000016", "step-00000018"]
    assert "the checkpoint of step 4 could not be written" in said and "training goes on, step-00000002 stays the newest" in said
    weights = [load_file(tmp_path / name / "best.safetensors") for name in ("whole", "parts")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def apart(rank: int, folder: Path) -> Any:
    """A stage whose folder is another one on each rank, as on two nodes' own disks, twice; and how often each rank began to train."""
    from jmt_dist.train import stage

    made, own = [], stage.Trainer.__init__

    def begin(self: Any, *arguments: Any) -> None:
        made.append(rank)
        own(self, *arguments)

    stage.Trainer.__init__ = begin  # type: ignore[method-assign, assignment]
    with redirect_stdout(StringIO()) as said:
        runs = [test_stage.run(rank, folder / str(rank), 2, 0, plain=True, max_epochs=1)["result"] for _ in range(2)]
    return runs, len(made), said.getvalue()


def test_without_a_common_folder_nothing_is_published_and_the_first_rank_says_what_is_done(tmp_path: Path) -> None:
    found = run_ranks(2, apart, tmp_path)
    assert "could not be written (what rank 1 wrote is not there: all nodes must share" in found[0][2]
    assert not list(tmp_path.glob("*/checkpoints/step-*"))
    assert [runs[1] for runs, *_ in found] == [found[0][0][0]] * 2 and [made for _, made, _ in found] == [1, 1]


def names_of_saves(rank: int, folder: Path) -> list[list[str]]:
    """The hidden folders that are there whenever a checkpoint is written; a start that was killed has left one behind."""
    from jmt_dist.train.checkpoint import Checkpoints

    found: list[list[str]] = []
    own = Checkpoints._write

    def write(self: Checkpoints, engine: Any, part: Path, *more: Any) -> None:
        own(self, engine, part, *more)
        found.append(sorted(path.name for path in self.folder.glob(".*")))

    Checkpoints._write = write  # type: ignore[method-assign, assignment]
    (folder / "checkpoints" / ".saving-00000001").mkdir(parents=True)
    test_stage.run(rank, folder, 1, 0, plain=True, max_epochs=1)
    return found


def test_no_checkpoint_is_written_under_the_name_of_the_one_before(tmp_path: Path) -> None:
    """Another node of an NFS may take that name for the folder it was: rank 8 would write into the published checkpoint."""
    found = run_ranks(1, names_of_saves, tmp_path)[0]
    assert len(found) == 3 and all(len(names) == 1 for names in found) and len({name for names in found for name in names}) == 3


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fills_the_disk(rank: int, folder: Path, for_good: bool) -> Any:
    """Somebody else fills the file system for a while, or for good."""
    other = folder / "somebody-elses"

    def fill() -> None:
        if rank == 0:
            with other.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    return

    def free() -> None:
        if rank == 0 and not for_good:
            other.unlink()

    with redirect_stdout(StringIO()) as said:
        try:
            return test_stage.run(rank, folder / "stage", 2, 0, plain=True, on_step=on_steps(fill, free)), said.getvalue()
        except UserError as error:
            return str(error), said.getvalue()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system; the limits above test the same for others")
def test_training_goes_on_while_the_disk_is_full_and_loses_nothing_where_it_stays_so(tmp_path: Path) -> None:
    whole = run_ranks(2, undisturbed, tmp_path / "whole", 0)[0]["result"]
    with small_disk(tmp_path / "disk") as disk:
        found, said = run_ranks(2, fills_the_disk, disk, False)[0]
        assert found["result"] == whole and "the checkpoint of step 4 could not be written" in said and "No space left" in said
        assert "the best weights could not be written" in said
        shutil.rmtree(disk / "stage")
        for error, _ in run_ranks(2, fills_the_disk, disk, True):
            assert "the result of toy cannot be written" in error and "the same command goes on" in error
        (disk / "somebody-elses").unlink()
        names = [path.name for path in (disk / "stage" / "checkpoints").iterdir()]
        assert names == ["step-00000002"]  # the last one before; nothing half-written beside it
        assert run_ranks(2, undisturbed, disk / "stage", 0)[0]["result"] == whole


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_each(rank: int, folder: Path) -> list[tuple[str, str]]:
    """For every file of a stage's newest checkpoint and every kind of damage: what a start says that has no other checkpoint."""
    test_stage.run(rank, folder / "made", 1, 7)
    newest = test_stage.newest(folder / "made").name
    found = []
    for k, name in enumerate(sorted(str(p.relative_to(folder / "made" / "checkpoints" / newest)) for p in files(folder / "made", newest))):
        for damage in (flip, cut, Path.unlink):
            copy = folder / f"copy-{k}-{damage.__name__}"
            shutil.copytree(folder / "made", copy)
            for other in (copy / "checkpoints").iterdir():
                if other.name != newest:
                    shutil.rmtree(other)
            damage(copy / "checkpoints" / newest / name)
            try:
                test_stage.run(rank, copy, 1, 0)
                found.append((f"{damage.__name__} {name}", ""))
            except UserError as error:
                found.append((f"{damage.__name__} {name}", str(error)))
    return found


def files(folder: Path, newest: str) -> list[Path]:
    return [path for path in (folder / "checkpoints" / newest).rglob("*") if path.is_file()]


@pytest.mark.slow
def test_every_damage_to_every_file_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    found = run_ranks(1, damage_each, tmp_path)[0]
    names = {case.split(" ", 1)[1] for case, _ in found}
    assert {"manifest.json", "progress.json", "rank-00000.pt", "kept-best.safetensors"} < names and any("engine/" in n for n in names)
    for case, said in found:
        assert "no checkpoint in" in said and "Move the folder away" in said, case
        assert re_any(said, ["is damaged", "cut short", "manifest"]), (case, said)


def re_any(text: str, words: list[str]) -> bool:
    return any(word in text for word in words)


def stopped_at_a_damaged_step(rank: int, folder: Path) -> tuple[bool, list[str]]:
    """A stage stopped after step 7, whose checkpoint of it is damaged, stopped there once more, and then ended."""
    whole = test_stage.run(rank, folder / "whole", 1, 0)["result"]
    stage = folder / "stage"
    test_stage.run(rank, stage, 1, 7)
    flip(stage / "checkpoints" / test_stage.newest(stage).name / "progress.json")
    test_stage.run(rank, stage, 1, 7)
    names = sorted(path.name for path in (stage / "checkpoints").iterdir())
    return test_stage.run(rank, stage, 1, 0)["result"] == whole, names


@pytest.mark.slow
def test_the_step_of_a_refused_checkpoint_is_saved_anew(tmp_path: Path) -> None:
    same, names = run_ranks(1, stopped_at_a_damaged_step, tmp_path)[0]
    assert same
    assert names == ["refused-step-00000007", "step-00000006", "step-00000007"]


def results(rank: int, folder: Path) -> list[Any]:
    """A finished stage whose result or best weights are damaged, started again; at last without a checkpoint."""
    whole = test_stage.run(rank, folder, 1, 0)["result"]
    assert test_stage.run(rank, folder.with_name("seldom"), 1, 0, save_steps=0, keep=1)["result"] == whole  # keys count on it
    best, done = folder / "best.safetensors", folder / "done.json"
    data, found = best.read_bytes(), []
    for path, damage in ((done, cut), (done, Path.unlink), (best, flip), (best, cut), (best, Path.unlink)):
        damage(path)
        again = test_stage.run(rank, folder, 1, 0)
        found.append((again["result"] == whole, again["logged"], best.read_bytes() == data, json.loads(done.read_text()) == whole))
    shutil.rmtree(folder / "checkpoints")
    flip(best)
    try:
        test_stage.run(rank, folder, 1, 0)
    except UserError as error:
        return [*found, str(error)]
    return found


def test_a_damaged_result_is_made_again_from_the_last_checkpoint_and_never_from_nothing(tmp_path: Path) -> None:
    *found, refused = run_ranks(1, results, tmp_path)[0]
    assert found == [(True, [], True, True)] * 5  # the same result, nothing trained, best weights and done.json whole
    assert "holds a result that is damaged, and no checkpoint" in refused


def test_damaged_weights_are_not_loaded(tmp_path: Path) -> None:
    from jmt_dist.train.weights import load_weights, write_weights

    net, path = test_stage.Net(plain=True), tmp_path / "best.safetensors"
    sha = write_weights(net.state_dict(), path)
    (tmp_path / "done.json").write_text(json.dumps({"weights": sha}))
    load_weights(net, path)
    flip(path)
    with pytest.raises(UserError, match="is damaged: its bytes are not those"):
        load_weights(net, path)
    (tmp_path / "done.json").unlink()
    cut(path)
    with pytest.raises(UserError, match="is damaged"):
        load_weights(net, path)
