"""What can be known to fail is refused before anything is written, in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, Workplace, write_shards


def refused(workplace: Workplace, *words: str, code: int = 1) -> str:
    """The program's own answer: exit code, one line, no run folder. In this process, since there are many of them."""
    out, errors, mask = workplace.out(), io.StringIO(), os.umask(0o022)
    program = runpy.run_path(str(ROOT / "launch" / "submit_folds.py"))
    arguments = [f"recipe={workplace.recipe}", f"site={workplace.site}", f"out={out}", *words]
    with contextlib.chdir(ROOT), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        program["run"](program["main"], "", [], arguments)
    os.umask(mask)
    lines = errors.getvalue().strip().splitlines()
    assert end.value.code == code and len(lines) == 1, errors.getvalue()
    assert not out.exists()
    return lines[0].partition(": ")[2]


def test_a_refusal_is_all_the_program_says_on_stderr(workplace: Workplace) -> None:
    command = [sys.executable, "launch/submit_folds.py", f"recipe={workplace.recipe}", f"site={workplace.site}", "fusion.modle=jmt"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stdout == ""
    expected = "submit_folds.py: unknown key `fusion.modle` (word `fusion.modle=jmt`). Did you mean `fusion.model`?"
    assert answer.stderr.strip() == expected


def test_a_wrong_key_names_the_nearest_right_one(workplace: Workplace) -> None:
    line = refused(workplace, "fusion.modle=jmt", code=2)
    assert "fusion.modle" in line and "`fusion.model`" in line
    assert "`site.parallel`" in refused(workplace, "site.paralel=1", code=2)
    assert "`folds.seed`" in refused(workplace, "folds.sed=1", code=2)


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["recipe=launch/recipes/dmeo.yaml"], 2, ["launch/recipes/dmeo.yaml", "demo.yaml"]),
        (["site=slurm/sites/nothing.yaml"], 2, ["slurm/sites/nothing.yaml"]),
        (["data.shards=nowhere/at-all"], 1, ["there is no shard folder", "nowhere/at-all", "pack_shards.py"]),
        (["folds=[fold-9]"], 1, ["fold-9", "official", "fold-5"]),
        (["folds.seed=3"], 1, ["seed 3", "folds.seed=3"]),
        (["site.time=25h"], 2, ["site.time", "25h"]),
        (["site.nodes=2"], 2, ["site.nodes", "local"]),
        (["site.ranks_per_node=3"], 1, ["visual.batch=8 does not divide over 3 ranks", "Use 2 ranks"]),
        (["visual.batch=9", "site.ranks_per_node=2"], 1, ["visual.batch=9", "Use 1 rank"]),
        (["fusion.ranks=2"], 1, ["fusion.ranks=2", "the job's 1"]),
        (["visual.weights=w.pt"], 1, ["visual.weights", "w.pt"]),
        (["visual.weights=kinetics400"], 1, ["visual.weights=kinetics400", "fetch_weights.py"]),
        (["visual.backbone=resnet5"], 1, ["no visual backbone resnet5", "r2plus1d, resnet50", "module:name"]),
        (["audio.backbone=r2plus1d"], 1, ["no audio backbone r2plus1d", "Known: resnet18;"]),
        (["fusion.jmt.heads=3"], 1, ["fusion.jmt.heads=3", "512"]),
        (["site.ranks_per_node=8"], 1, ["4 samples", "8 ranks"]),
        (["site.tracking_uri=http://me:secret@host:5000"], 2, ["holds a password", "MLFLOW_TRACKING_PASSWORD"]),
        (["site.tracking_uri=postgresql+psycopg2://me:s/ecret@host/runs"], 2, ["holds a password", "tracking server"]),
        (["site.executor=slurm", "out=runs/100%"], 1, ["runs/100%", "pattern"]),
        (["site.signal_seconds=400"], 2, ["site.signal_seconds", "400"]),
    ],
)
def test_refusals(workplace: Workplace, words: list[str], code: int, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    line = refused(workplace, *words, code=code)
    for part in parts:
        assert part in line


def test_the_width_is_the_models() -> None:
    from jmt_dist.cluster import preflight
    from jmt_dist.model import attention

    assert preflight.WIDTH == attention.WIDTH


def test_weights_of_another_backbone_are_refused(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = workplace.recipe.parent / "cache" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(cache.parents[1]))
    for name in ("r2plus1d_18-0.pth", "resnet18-0.pth"):
        (cache / name).touch()
    assert "fits another backbone than audio.backbone=resnet18. Take imagenet or" in refused(workplace, "audio.weights=kinetics400")
    assert "there are none for depth 10" in refused(workplace, "visual.weights=kinetics400", "visual.depth=10")
    words = ("audio.backbone=mine.ears:deep", "audio.weights=imagenet")
    assert "fits another backbone than audio.backbone=mine.ears:deep. Take none or" in refused(workplace, *words)


def test_stages_that_do_not_run_are_not_checked(workplace: Workplace) -> None:
    code, text = workplace.submit(workplace.out(), "visual.batch=7", "site.ranks_per_node=2", "stages=[fusion,evaluate]", "dry=true")
    assert code == 0, text


def test_damaged_shards(workplace: Workplace, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "empty")
    shutil.rmtree(shards / "folds" / "train+validation-0" / "fold-2" / "validation")
    line = refused(workplace, f"data.shards={shards}")
    assert "validation part of fold `fold-2`" in line and "no sample" in line
    other = write_shards(tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["geometry"]["segment"] = 128
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert "another geometry (segment)" in refused(workplace, f"data.shards={other}")


def test_too_few_gpus_for_the_parallel_jobs(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    line = refused(workplace, "site.device=auto", "site.gpus_per_node=2")
    assert "2 parallel jobs of 2 GPU(s) need 4, and this machine offers 3" in line and "site.parallel=1" in line


def test_someone_elses_folder_is_refused_and_an_open_one_is_closed(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    from jmt_dist.cluster import plan
    from jmt_dist.errors import UserError

    out = workplace.out()
    out.mkdir(parents=True)
    out.chmod(0o777)
    with pytest.raises(UserError, match="others may write"):
        plan.check_owner(out)
    code, text = workplace.submit(out, "folds=[official]")
    assert code == 0 and "chmod 700" in text and out.stat().st_mode & 0o777 == 0o700
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        plan.check_owner(out)


@pytest.mark.parametrize("program", ["submit_folds", "run_fold", "submit_sweep", "show_status", "cancel_jobs", "resume_jobs", "check_site"])
def test_help_imports_nothing_heavy(program: str) -> None:
    command = [sys.executable, "-X", "importtime", f"launch/{program}.py", "--help"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0 and "key=value" in answer.stdout
    lines = [line.removeprefix("import time:").split("|") for line in answer.stderr.splitlines() if line.count("|") == 2]
    assert not {name.strip() for _, _, name in lines} & {"torch", "numpy", "mlflow", "rich", "submitit", "psutil"}
