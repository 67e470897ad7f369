"""Programs of launch/ that run or submit something: one fold in this process, and sweeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jmt_dist.cluster import control
from jmt_dist.cluster.graph import graph
from jmt_dist.cluster.share import link_stages, require_done
from jmt_dist.cluster.sweep import variants
from jmt_dist.errors import UsageError, UserError
from jmt_dist.recipe import load_recipe
from tests.cluster.conftest import HERE, ROOT, Workplace, starts
from tests.cluster.test_local import wait_for
from tests.cluster.test_slurm import SLURM, slurm  # noqa: F401

DRIVER = """
import os, sys
sys.path.insert(0, "launch")
import {program} as program
{patch}
from jmt_dist.program import run
run(program.main, "", [])
"""
SINGLE = "import jmt_dist.cluster.single as s; s.run_single.__defaults__ = ('toyjob:run_fold',)"
SWEEP = """
import jmt_dist.cluster.sweep as s, jmt_dist.cluster.tracking as t
s.submit_sweep.__defaults__ = ("toyjob:run_fold", "toyjob:compare_sweep")
t.prepare = lambda *_: None
"""


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("programs"))


def start(workplace: Workplace, program: str, patch: str, *words: str, **toy: object) -> subprocess.Popen[str]:
    """A program of launch/ with the toy job in place of training."""
    code = DRIVER.format(program=program, patch=patch)
    environment = workplace.environment(**toy)
    environment["PYTHONPATH"] = f"{HERE}{os.pathsep}{ROOT}"
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_run_fold_runs_in_this_process_stops_on_a_signal_and_resumes(workplace: Workplace) -> None:
    out = workplace.out()
    words = [f"recipe={workplace.recipe}", f"site={workplace.site}", f"out={out}", "fold=official"]
    environment = {"RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(environment)
    try:
        process = start(workplace, "run_fold", SINGLE, *words, official={"steps": 1000})
        wait_for(lambda: starts(out))
        assert starts(out)[0]["pid"] == process.pid
        process.send_signal(signal.SIGUSR2)
        text, _ = process.communicate(timeout=30)
        assert process.returncode == 1 and "stopped by SIGUSR2 after saving" in text
        status = json.loads((out / "official" / "status.json").read_text())
        # what slurm/run_fold.sbatch looks for
        assert (status["state"], status["reason"]) == ("stopped", "SIGUSR2")
        assert '"reason": "SIGUSR2"' in (out / "official" / "status.json").read_text()
        saved = int((out / "official" / "state-0").read_text())
        process = start(workplace, "run_fold", SINGLE, *words, official={"steps": saved + 1})
        text, _ = process.communicate(timeout=30)
        changed = [*words, "fusion.jmt.scale=sqrt"]
        part = start(workplace, "run_fold", SINGLE, *changed, "stages=[visual]", official={"steps": saved + 1})
        assert "other settings" not in part.communicate(timeout=30)[0] and part.returncode == 0  # the fusion is still that of before
        other = start(workplace, "run_fold", SINGLE, *changed, "stages=[fusion]", official={"steps": saved + 1})
        said, _ = other.communicate(timeout=30)
    finally:
        for name in environment:
            os.environ.pop(name)
    assert process.returncode == 0 and text.splitlines()[-1] == str(out / "official") and "other settings" not in text
    assert starts(out)[1]["from"] == saved
    # the recipe beside the folds is that of the weights in them: of other scores they have the same shapes
    kept = load_recipe(out / "recipe.yaml")
    assert other.returncode == 0 and "recipe.yaml was of other settings" in said and kept.fusion.jmt.scale == "sqrt"
    assert kept.stages == load_recipe(workplace.recipe).stages
    assert json.loads((out / "official" / "status.json").read_text())["state"] == "done"


def test_run_fold_names_a_fold_that_does_not_exist(workplace: Workplace) -> None:
    command = [sys.executable, "launch/run_fold.py", f"recipe={workplace.recipe}", f"site={workplace.site}", "fold=fold-7"]
    answer = subprocess.run([*command, f"out={workplace.out()}"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1 and "fold-7" in answer.stderr and "fold-5" in answer.stderr


def write_sweep(workplace: Workplace, text: str) -> Path:
    path = workplace.folder / "sweep.yaml"
    path.write_text(f"recipe: {workplace.recipe.name}\nvariants:\n{text}")
    return path


def test_a_sweep_runs_every_variant_in_its_own_folder_shared_stages_once_and_goes_on(workplace: Workplace) -> None:
    sweep = write_sweep(workplace, "  plain: []\n  wide: [fusion.batch=4]\n  deep: [visual.depth=10]\n")
    out = workplace.out()
    words = [f"sweep={sweep}", f"site={workplace.site}", f"out={out}", "folds=[official]"]
    process = start(workplace, "submit_sweep", SWEEP, *words, official={"stages": True})
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert text.splitlines()[-2:] == ["3 of 3 folds of 3 variant(s) are done", str(out)]
    assert load_recipe(out / "wide" / "recipe.yaml").fusion.batch == 4
    assert load_recipe(out / "wide" / "recipe.yaml").name == "toy-wide"
    assert load_recipe(out / "plain" / "recipe.yaml").fusion.batch == 2
    # audio by one job for all three, visual and features by one for two of them
    done = [(note["run"].partition("-")[0], note["did"]) for run in (out, out / "shared") for note in _toy_notes(run)]
    backbones = [("visual", ["visual"]), ("audio", ["audio"]), ("features", ["features"])]
    own = [("plain", ["fusion", "evaluate"]), ("wide", ["fusion", "evaluate"]), ("deep", ["visual", "features", "fusion", "evaluate"])]
    assert sorted(done) == sorted(backbones + own)
    assert (out / "comparison.csv").read_text().split() == ["plain", "wide", "deep"]
    process = start(workplace, "submit_sweep", SWEEP, *words, official={"raise_at": 1})
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "nothing to do" in text
    show = [sys.executable, "launch/show_status.py", f"out={out}"]
    rows = subprocess.run(show, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[:-1]
    assert len(rows) == 6 and rows[-1].startswith("deep official  done")


def _toy_notes(folder: Path) -> list[dict[str, object]]:
    return [{**note, "run": run.name} for run in folder.iterdir() if run.is_dir() for note in starts(run) if "did" in note]


@pytest.mark.slow
def test_a_failed_shared_stage_fails_those_that_need_it_at_once_and_says_why(workplace: Workplace) -> None:
    sweep = write_sweep(workplace, "  plain: []\n  wide: [fusion.batch=4]\n")
    out = workplace.out()
    words = [f"sweep={sweep}", f"site={workplace.site}", f"out={out}", "folds=[official,fold-1]", "site.tries=2"]
    process = start(workplace, "submit_sweep", SWEEP, *words, official={"stages": True}, fold_1={"stages": True, "fail_stage": "audio"})
    text, _ = process.communicate(timeout=90)
    assert process.returncode == 3 and "2 of 4 folds of 2 variant(s) are done" in text, text
    reason = json.loads((out / "wide" / "fold-1" / "status.json").read_text())["reason"]
    assert "features-" in reason and "which this job shares with others, is not done" in reason
    assert len(json.loads((out / "wide" / "fold-1" / "attempts.json").read_text())["attempts"]) == 1  # it would come again
    again = start(workplace, "submit_sweep", SWEEP, *words, star={"stages": True})
    text, _ = again.communicate(timeout=90)
    assert again.returncode == 0 and "4 of 4 folds of 2 variant(s) are done" in text, text


def test_a_refused_comparison_leaves_a_sweep_in_the_queue(
    workplace: Workplace,
    slurm: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_SLURM_HOLD", "1")
    sweep, out = write_sweep(workplace, "  plain: []\n  wide: [fusion.batch=4]\n"), workplace.out()
    words = [*SLURM, "site.partition=gpus-only", "site.gpus_per_node=1", "folds=[official]"]
    process = start(workplace, "submit_sweep", SWEEP, f"sweep={sweep}", f"site={workplace.site}", f"out={out}", *words)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and "missing: the comparison: SLURM refused the job: " in text, text
    assert f"python launch/compare_runs.py out={out}" in text and "compare" not in json.loads((out / "sweep.json").read_text())
    assert len(control.live_jobs(out / "plain")) == len(control.live_jobs(out / "wide")) == 1


def test_a_grid_is_every_combination_and_random_draws_repeat(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: r\n")
    (tmp_path / "grid.yaml").write_text(
        "recipe: r.yaml\ngrid:\n  fusion.optimizer.lr: [3e-4, 1e-3]\n  fusion.jmt.scale: [none, sqrt]\n  visual.batch: [2, 4]\n"
        "  audio.batch: [8]\n"
    )
    grid = variants(tmp_path / "grid.yaml", [])
    assert len(grid) == 8 and "lr0.0003-scalesqrt-visual.batch4-audio.batch8" in grid
    found = {(r.fusion.optimizer.lr, r.fusion.jmt.scale, r.visual.batch, r.audio.batch) for r in grid.values()}
    assert found == {(lr, scale, batch, 8) for lr in (3e-4, 1e-3) for scale in ("none", "sqrt") for batch in (2, 4)}
    text = (
        "recipe: r.yaml\nsamples: {}\nrandom:\n  fusion.optimizer.lr: {{low: 1e-5, high: 1e-2, log: true}}\n"
        "  fusion.batch: [2, 4, 8]\n  visual.size: {{low: 16, high: 224}}\n  visual.dropout: {{low: 0.0, high: 0.9}}\n"
    )
    (tmp_path / "random.yaml").write_text(text.format(200))
    drawn = variants(tmp_path / "random.yaml", [])
    rates = sorted(recipe.fusion.optimizer.lr for recipe in drawn.values())
    assert len(drawn) == 200 and rates[0] >= 1e-5 and rates[-1] <= 1e-2 and 1e-4 < rates[100] < 1e-3  # the median of three decades
    assert {recipe.fusion.batch for recipe in drawn.values()} == {2, 4, 8}
    (tmp_path / "random.yaml").write_text(text.format(5))
    assert list(variants(tmp_path / "random.yaml", []).values()) == list(drawn.values())[:5]
    for broken, words in [
        ("random: {fusion.batch: {low: 4, high: 2}}", "low=4 and high=2"),
        ("grid: {fusion.btach: [2]}", r"fusion\.btach"),
        ("grid: {fusion.batch: [2]}\nvariants: {a: []}", "one of"),
        ("grid: {fusion.batch: []}", "grid"),
    ]:
        (tmp_path / "broken.yaml").write_text(f"recipe: r.yaml\n{broken}\n")
        with pytest.raises(UsageError, match=words):
            variants(tmp_path / "broken.yaml", [])


def test_a_mistake_in_any_variant_is_found_before_the_first_is_submitted(workplace: Workplace) -> None:
    with pytest.raises(UsageError, match=r"variant `b` .*fusion\.modle"):
        variants(write_sweep(workplace, "  a: []\n  b: [fusion.modle=jmt]\n"), [])
    for name in ("a/b", "shared", "jobs", "snapshot"):
        with pytest.raises(UsageError, match="cannot name a folder"):
            variants(write_sweep(workplace, f"  {name}: []\n"), [])
    with pytest.raises(UsageError, match="variants"):
        variants(write_sweep(workplace, "  {}\n"), [])


@pytest.mark.parametrize(("name", "count"), [("grid", 12), ("ablation", 26)])
def test_the_sweeps_of_the_repository_can_be_read_and_share_their_backbones(name: str, count: int) -> None:
    recipes = variants(ROOT / "launch" / "recipes" / f"{name}.yaml", [])
    assert len(recipes) == count and len({recipe.name for recipe in recipes.values()}) == count
    nodes = graph(recipes)
    shared = [node for node in nodes.values() if node.level < 2]
    assert [node.recipe.stages for node in shared] == [["visual"], ["audio"], ["features"]]
    assert {node.needs for node in nodes.values() if node.level == 2} == {(shared[2].name,)}


def test_only_what_is_alike_is_shared() -> None:
    def nodes(*words: list[str]) -> dict[str, tuple[list[str], tuple[str, ...]]]:
        found = graph({f"v{n}": load_recipe(None, some) for n, some in enumerate(words)})
        return {
            name.rpartition("-")[0] or name: (node.recipe.stages, tuple(n.rpartition("-")[0] for n in node.needs))
            for name, node in found.items()
        }

    every = ["visual", "audio", "features", "fusion", "evaluate"]
    assert nodes(["label=end"], ["label=middle"]) == {"v0": (every, ()), "v1": (every, ())}
    assert nodes([]) == {"v0": (every, ())}
    assert nodes(["seed=1"], ["seed=2"]) == {"v0": (every, ()), "v1": (every, ())}
    assert nodes(["visual.batch=2"], ["visual.batch=4"]) == {
        "shared/audio": (["audio"], ()), "v0": (every, ("shared/audio",)), "v1": (every, ("shared/audio",))
    }  # fmt: skip
    offsets = ["features.offsets=[0]", "fusion.validation_offsets=[0]", "evaluate.offsets=[0]", "fusion.offsets_per_epoch=1"]
    apart = nodes([], offsets)
    assert set(apart) == {"shared/visual", "shared/audio", "v0", "v1"} and apart["v1"][1] == ("shared/visual", "shared/audio")
    assert set(nodes(["stages=[fusion]"], ["stages=[fusion]", "fusion.batch=4"])) == {"v0", "v1"}
    # only one of them trains the visual backbone: it is trained where the features are made
    mixed = nodes([], ["stages=[audio,features,fusion,evaluate]", "fusion.batch=4"])
    assert mixed["shared/features"] == (["visual", "features"], ("shared/audio",))


def test_finished_stages_are_linked_and_nothing_else(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for stage in ("visual", "audio", "fusion"):
        (first / "official" / stage / "best").mkdir(parents=True)
        (first / "official" / stage / "best" / "weights").write_text(stage)
    (first / "official" / "visual" / "done.json").write_text("{}")
    (first / "official" / "fusion" / "done.json").write_text("{}")
    assert link_stages([first], second, "official") == ["visual"]  # audio is unfinished, the fusion is the variant's own
    assert sorted(path.name for path in (second / "official").iterdir()) == ["visual"]
    copy = second / "official" / "visual" / "best" / "weights"
    assert copy.read_text() == "visual" and copy.stat().st_ino == (first / "official" / "visual" / "best" / "weights").stat().st_ino
    (first / "official" / "audio" / "done.json").write_text("{}")
    (second / "official" / "audio").mkdir()
    assert link_stages([first], second, "official") == []  # there already: not touched
    with pytest.raises(UserError, match="first, which this job shares with others, is not done: it has not started"):
        require_done([first], "official")


def test_every_site_of_the_repository_is_valid() -> None:
    from jmt_dist.cluster.site import check
    from jmt_dist.recipe import load_site

    paths = sorted((ROOT / "slurm" / "sites").glob("*.yaml"))
    assert len(paths) >= 5
    for path in paths:
        check(load_site(path))


@pytest.mark.parametrize("path", ["slurm/run_fold.sbatch", "slurm/minicluster/up", "slurm/minicluster/down"])
def test_shell_scripts_parse(path: str) -> None:
    assert subprocess.run(["bash", "-n", path], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(("writes", "requeued"), [("SIGUSR2", True), ("RuntimeError: lost", False), ("", False)])
def test_the_plain_script_queues_again_what_this_start_has_saved(tmp_path: Path, writes: str, requeued: bool) -> None:
    """The last case fails before it has a status of its own, after a start that had saved: it would come again for ever."""
    found = tmp_path / "a run" / "fold-2" / "status.json"
    found.parent.mkdir(parents=True)
    found.write_text('{\n "reason": "SIGUSR2",\n "update": "before"\n}\n')
    text = f'{{\n "reason": "{writes}",\n "update": "now"\n}}\n'
    fakes = {"srun": f"printf %s '{text}' >'{found}'\nexit 1" if writes else "exit 1", "squeue": "echo RUNNING"}
    for name, body in {**fakes, "scontrol": f"echo \"$@\" >>'{tmp_path}/requeued'"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    command = ["bash", "slurm/run_fold.sbatch", "recipe.yaml", "site.yaml", str(found.parents[1])]
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode == 1
    assert ((tmp_path / "requeued").exists() and (tmp_path / "requeued").read_text() == "requeue 7_2\n") == requeued


def test_make_has_the_cluster_up_and_down() -> None:
    for name in ("up", "down"):
        answer = subprocess.run(["make", "--no-print-directory", "-n", f"cluster-{name}"], cwd=ROOT, capture_output=True, text=True)
        assert answer.stdout.splitlines()[-1].strip() == f"slurm/minicluster/{name}", answer.stderr
