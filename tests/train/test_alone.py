"""Stages by themselves, through launch/run_fold.py: each in its turn and out of it, and on features that are not as they were stored."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from jmt_dist.config import PackOptions
from jmt_dist.data.pack import pack
from jmt_dist.errors import UserError
from jmt_dist.evaluate.predict import read_predictions
from jmt_dist.train.weights import write_weights
from tests.data.test_features import flip
from tests.data.tree import write_test_unit, write_unit
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
WORDS = ["fold=official", f"site={ROOT / 'slurm' / 'sites' / 'local.yaml'}", f"recipe={ROOT / 'launch' / 'recipes' / 'demo.yaml'}"]
WORDS += ["visual.size=16", "visual.max_steps=2", "audio.max_steps=2"]
WORDS += ["visual.batch=2", "audio.batch=2", "features.batch=4", "fusion.batch=4", "fusion.seeds=[0]", "fusion.baselines=[]"]
WORDS += ["fusion.max_epochs=1", "features.offsets=[1]", "fusion.offsets_per_epoch=1", "fusion.validation_offsets=[1]"]
WORDS += ["evaluate.offsets=[1]", "evaluate.bootstrap=20", "engine.precision=fp32", "fusion.model=concat"]

ALL = "visual,audio,features,fusion,evaluate"

pytestmark = pytest.mark.slow


def run(place: Path, out: str, stages: str, *more: str) -> tuple[str, str]:
    """(the UserError it ends with, what it prints) of run_fold.py with some stages; tars of features hold 4 samples."""
    from jmt_dist.train import extract

    extract.SAMPLES = 4
    sys.path.insert(0, str(ROOT / "launch"))
    import run_fold

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            assert run_fold.main([*WORDS, f"data.shards={place}/shards", f"out={place / out}", f"stages=[{stages}]", *more]) == 0
        except UserError as error:
            return str(error), said.getvalue()
    return "", said.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for k in range(7):
        write_unit(folder / "tree", f"u{k}", 70, k, "Train_Set" if k < 5 else "Validation_Set")
    write_test_unit(folder / "tree", "u7", 70, 7)
    pack(PackOptions(source=str(folder / "tree"), out=str(folder / "shards"), workers=1), say=lambda line: None)
    return folder


def in_turn(rank: int, place: Path) -> list[tuple[str, str, list[str]]]:
    """(stage, its error, the stages that then have a result) of stages out of their turn and in it; at last, of the test units."""
    found = []
    out_of_turn = ["fusion", "features", "evaluate", "visual", "features", "fusion", "audio", "fusion", "features", "evaluate"]
    for stage in (*out_of_turn, "fusion", "evaluate"):
        error, log = run(place, "whole", stage)
        if stage == "visual":  # what it takes is said before it is taken
            need = (
                r"visual: [\d.]+ M parameters, \d+ MB with gradients and optimiser; about \d+ MB of activations for 2 .*; 2 steps at most"
            )
            assert re.search(need, log), log
        there = sorted({path.relative_to(place / "whole" / "official").parts[0] for path in (place / "whole").rglob("done.json")})
        found.append((stage, error, there))
    error, _ = run(place, "whole", "evaluate", "fusion.optimizer.lr=0.5")
    found.append(("evaluate of other options", error, []))
    trained = ages(place / "whole")
    for stages in ("evaluate", "features", "evaluate"):
        error, log = run(place, "whole", stages, "evaluate.test=true")
        found.append((f"{stages} of test units", error, log.splitlines()))
    assert trained.items() <= ages(place / "whole").items()
    retrain(place / "whole/official/visual")
    (place / "whole/official/evaluate/done.json").unlink()
    for stage in ("features", "fusion", "evaluate"):
        found.append((f"{stage} after visual", run(place, "whole", stage, "evaluate.test=true")[0], []))
    for stage in ("features", "fusion"):  # as one is told
        shutil.rmtree(place / "whole/official" / stage)
    found.append(("made anew", run(place, "whole", "features,fusion,evaluate", "evaluate.test=true")[0], []))
    scores = [(place / "whole/official/metrics.json").read_text()]
    retrain(place / "whole/official/fusion/concat-seed0")
    for _ in range(2):
        found.append(("evaluate after fusion", run(place, "whole", "evaluate", "evaluate.test=true")[0], []))
        scores.append(f"{(place / 'whole/official/metrics.json').stat().st_mtime_ns}")
        assert (place / "whole/official/metrics.json").read_text() != scores[0]  # not the scores of the weights that were there before
    assert scores[1] == scores[2]
    return found


def retrain(stage: Path) -> None:
    """What another training leaves under the same key: whole, and with other weights."""
    weights = {name: value * 1.01 for name, value in load_file(stage / "best.safetensors").items() if value.is_floating_point()}
    sha = write_weights({**load_file(stage / "best.safetensors"), **weights}, stage / "best.safetensors")
    result = json.loads((stage / "done.json").read_text())
    (stage / "done.json").write_text(json.dumps({**result, "weights": sha}))


def ages(out: Path) -> dict[str, int]:
    """When what test units do not change was made."""
    paths = [*out.rglob("best.safetensors"), *tars(out, "train"), *tars(out, "validation")]
    return {str(path): path.stat().st_mtime_ns for path in paths}


def test_each_stage_runs_by_itself_and_names_the_stage_that_must_be_run_before_it(place: Path) -> None:
    [steps] = run_ranks(1, in_turn, place)
    said = [error.replace(str(place / "whole/official"), "OUT") for _, error, _ in steps]
    none = "OUT/features holds no features of this recipe. Run stages=["
    no_fusion = "the fusion of model concat with seed 0 is not done in OUT. Run stages=[fusion] first."
    assert said[:3] == [
        f"{none}visual,audio,features] first.",
        "the visual stage of this recipe is not done in OUT. Run stages=[visual] first.",
        no_fusion,
    ]
    assert said[3:9] == [
        "",
        "the audio stage of this recipe is not done in OUT. Run stages=[audio] first.",
        f"{none}audio,features] first.",
        "",
        f"{none}features] first.",
        "",
    ]
    assert said[9:13] == [no_fusion, "", "", no_fusion]  # at last: never the weights of another recipe
    lacking = "OUT/features holds no features of part test"
    assert said[13].startswith(f"{lacking}. Run the features stage of this fold again: only samples that are not") and said[14:16] == [
        "",
        "",
    ]
    other = "OUT/features was made by another training of the visual stage than OUT/visual holds now."
    remove = "Remove features and fusion of OUT: they are then made anew; or put the visual stage back."
    assert said[16:] == [f"{other} {remove}"] * 3 + [""] * 3
    assert f"{place}/whole/official/features holds no features of part test: what is not stored whole is computed now" in steps[14][2]
    assert set(read_predictions(place / "whole/official/evaluate/concat-seed0/test.parquet")) == {"u7"}
    assert [there for _, _, there in steps[:3]] == [[]] * 3 and steps[8][2] == ["audio", "features", "visual"]
    assert steps[11][2] == ["audio", "evaluate", "features", "fusion", "visual"]
    assert json.loads((place / "whole/official/metrics.json").read_text())["frames"] == 140


def lost_weights(rank: int, folder: Path) -> list[str]:
    """What a rank says in three places where the first one alone looks for results, and initial weights have gone."""
    from jmt_dist.train import fold, ranks, stored

    class Plan:
        """As far as these look at one."""

        def __init__(self) -> None:
            self.folder = folder

        def key(self, name: str) -> str:
            raise UserError(f"{name}.weights names a file that does not exist")

    ranks.start(torch.device("cpu"))
    plan, found = cast(Any, Plan()), []
    looks = [partial(stored.require_own, plan, folder), partial(stored.require_whole, plan, folder, [])]
    for look in (partial(fold._finished, plan, "visual"), *looks):
        try:
            look()
        except UserError as error:
            found.append(str(error))
    return found


def test_lost_initial_weights_are_said_by_every_rank(tmp_path: Path) -> None:
    (tmp_path / "backbones.json").write_text("{}")
    assert run_ranks(2, lost_weights, tmp_path) == [["visual.weights names a file that does not exist"] * 3] * 2


def tars(out: Path, part: str) -> list[Path]:
    return sorted((out / "official" / "features").glob(f"{part}-*.tar"))


def spoil(out: Path, fault: str, part: str) -> str:
    """Do a kind of damage to the features of a run folder; returns the sentence it must be met with."""
    one, other, *_ = tars(out, part)
    if fault == "flip":
        flip(other, other.stat().st_size // 2)
        return f"{other} is damaged: its bytes are not those that were stored"
    if fault == "cut":
        size = other.stat().st_size
        other.write_bytes(other.read_bytes()[: size // 2])
        return f"{other} has {size // 2} bytes, not the {size} that were stored"
    if fault == "remove":
        other.unlink()
        return f"{other} is missing"
    one.rename(out / "kept")
    other.rename(one)
    (out / "kept").rename(other)
    return f"{one} is damaged: its bytes are not those that were stored"


def spoilt(rank: int, place: Path) -> list[dict[str, Any]]:
    """What fusion, then the whole fold, then evaluate say of each kind of damage to features of a fold that was whole."""
    found = []
    assert run(place, "whole", ALL)[0] == ""
    for fault in ("flip", "cut", "remove", "swap"):
        out = place / fault
        shutil.copytree(place / "whole", out, ignore=shutil.ignore_patterns("checkpoints", "fusion", "evaluate"))
        whole = {path.stat().st_ino for path in tars(out, "train")[2:]}
        first = spoil(out, fault, "train")
        refused = run(place, fault, "fusion")[0]
        error, log = run(place, fault, ALL)
        assert whole < {path.stat().st_ino for path in tars(out, "train")}  # what is whole is not made again
        metrics = json.loads((out / "official/metrics.json").read_text())
        (out / "official/evaluate/done.json").unlink()
        late = spoil(out, fault, "validation")
        found.append({"first": first, "late": late, "fusion": refused, "error": error, "log": log, "metrics": metrics})
        found[-1]["evaluate"] = run(place, fault, "evaluate")[0]
    return found


def test_features_that_are_not_as_they_were_stored_are_refused_and_what_they_held_is_made_again(place: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").symlink_to(place / "shards")
    [cases] = run_ranks(1, spoilt, tmp_path)
    assert (len(tars(tmp_path / "whole", "train")), len(tars(tmp_path / "whole", "validation"))) == (5, 2)
    wanted = json.loads((tmp_path / "whole/official/metrics.json").read_text())
    again = "Run the features stage of this fold again"
    for case in cases:
        assert case["fusion"].startswith(f"{case['first']}. {again}"), case
        assert case["evaluate"].startswith(f"{case['late']}. {again}"), case
        assert case["error"] == "" and f"{case['first']}: what is not stored whole is computed now\n" in case["log"], case
        assert case["metrics"] == wanted
    # with two ranks one of them reads, and both say it
    fresh = tmp_path / "flip"
    shutil.rmtree(fresh)
    shutil.copytree(tmp_path / "whole", fresh, ignore=shutil.ignore_patterns("checkpoints", "fusion"))
    sentence = spoil(fresh, "flip", "train")
    assert [error.partition(". Run")[0] for error, _ in run_ranks(2, run_rank, tmp_path, "flip", "fusion")] == [sentence] * 2
    _without_digests(fresh / "official" / "features")  # as an earlier version left them
    (error, log), _ = run_ranks(2, run_rank, tmp_path, "flip", "fusion")
    assert error == "" and log.count("stored without digests: its bytes cannot be checked") == 1


def run_rank(rank: int, place: Path, out: str, stages: str) -> tuple[str, str]:
    return run(place, out, stages)


def _without_digests(features: Path) -> None:
    for path in features.glob("*.tar"):
        path.rename(path.with_name(f"{path.stem.rpartition('-')[0]}.tar"))
    values = json.loads((features / "features.json").read_text())
    (features / "features.json").write_text(json.dumps({name: values[name] for name in ("offsets", "dtype", "width")} | {"version": 2}))
