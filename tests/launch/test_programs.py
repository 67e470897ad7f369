"""Programs of launch/ that run or submit something: one fold in this process, and sweeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jmt_dist.cluster.share import link_stages, same_stages
from jmt_dist.cluster.sweep import variants
from jmt_dist.errors import UsageError
from jmt_dist.recipe import load_recipe
from tests.cluster.conftest import HERE, ROOT, Workplace, starts
from tests.cluster.test_local import wait_for

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
s.submit_sweep.__defaults__ = ("toyjob:run_fold", "toyjob:compare")
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
    finally:
        for name in environment:
            os.environ.pop(name)
    assert process.returncode == 0 and text.splitlines()[-1] == str(out / "official")
    assert starts(out)[1]["from"] == saved
    assert json.loads((out / "official" / "status.json").read_text())["state"] == "done"


def test_run_fold_names_a_fold_that_does_not_exist(workplace: Workplace) -> None:
    command = [sys.executable, "launch/run_fold.py", f"recipe={workplace.recipe}", f"site={workplace.site}", "fold=fold-7"]
    answer = subprocess.run([*command, f"out={workplace.out()}"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1 and "fold-7" in answer.stderr and "fold-5" in answer.stderr


def write_sweep(workplace: Workplace, text: str) -> Path:
    path = workplace.folder / "sweep.yaml"
    path.write_text(f"recipe: {workplace.recipe.name}\nvariants:\n{text}")
    return path


def test_a_sweep_submits_every_variant_to_its_own_folder_and_goes_on(workplace: Workplace) -> None:
    sweep = write_sweep(workplace, "  plain: []\n  wide: [fusion.batch=4]\n")
    out = workplace.out()
    words = [f"sweep={sweep}", f"site={workplace.site}", f"out={out}", "folds=[official]"]
    process = start(workplace, "submit_sweep", SWEEP, *words)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert text.splitlines()[-3:] == ["plain: done", "wide: done", str(out)]
    assert load_recipe(out / "wide" / "recipe.yaml").fusion.batch == 4
    assert load_recipe(out / "wide" / "recipe.yaml").name == "toy-wide"
    assert load_recipe(out / "plain" / "recipe.yaml").fusion.batch == 2
    process = start(workplace, "submit_sweep", SWEEP, *words, official={"raise_at": 1})
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and text.count("nothing to do") == 2


def test_a_mistake_in_any_variant_is_found_before_the_first_is_submitted(workplace: Workplace) -> None:
    with pytest.raises(UsageError, match=r"variant `b` .*fusion\.modle"):
        variants(write_sweep(workplace, "  a: []\n  b: [fusion.modle=jmt]\n"), [])
    with pytest.raises(UsageError, match="cannot name a folder"):
        variants(write_sweep(workplace, "  a/b: []\n"), [])
    with pytest.raises(UsageError, match="variants"):
        variants(write_sweep(workplace, "  {}\n"), [])


@pytest.mark.parametrize("name", ["grid", "ablation"])
def test_the_sweeps_of_the_repository_can_be_read_and_share_their_backbones(name: str) -> None:
    recipes = list(variants(ROOT / "launch" / "recipes" / f"{name}.yaml", []).values())
    assert len(recipes) > 5 and len({recipe.name for recipe in recipes}) == len(recipes)
    assert all(same_stages(recipes[0], other) for other in recipes)


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
    recipe = load_recipe(None)
    assert same_stages(recipe, load_recipe(None, ["fusion.batch=4"])) and not same_stages(recipe, load_recipe(None, ["visual.depth=10"]))


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
