"""check_site.py where everything is wrong: each failure names its remedy, and none keeps the others away."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

from jmt_dist.cluster import site_check
from jmt_dist.cluster.finding import Finding
from jmt_dist.cluster.options import CheckOptions
from jmt_dist.config import Recipe, Site
from jmt_dist.errors import UsageError
from tests.cluster.conftest import ROOT, Workplace


def findings(options: CheckOptions, site: Site, recipe: Recipe | None) -> list[Finding]:
    return [found for check in site_check.checks(options, site, recipe) for found in site_check._guarded(check)]


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without SLURM, weights or working libraries."""
    (tmp_path / "bin").mkdir()
    for name in ("stat", "bash"):
        (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(site_check, "_PROBES", {"broken library": "import no_such_module"})
    return tmp_path


def test_every_failed_check_names_its_remedy(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe.model_validate({"data": {"shards": str(bare / "nowhere")}})
    site = Site(
        executor="slurm", device="cuda", gpus_per_node=4, ranks_per_node=4, nodes=2, time="00:01:00", signal_seconds=600,
        tracking_uri="http://127.0.0.1:9", environment=["export GLOO_SOCKET_IFNAME=^lo"],
    )  # fmt: skip
    options = CheckOptions(site="", out="/proc/runs")
    found = findings(options, site, recipe)
    failed = {one.name: one for one in found if one.outcome == "fail"}
    expected = {"run folder", "tracking", "weights kinetics400", "weights imagenet", "SLURM commands", "network interface"}
    assert expected | {"recipe and site", "broken library"} == set(failed)
    assert [one.name for one in found if one.outcome != "ok" and not one.remedy] == []
    assert "no_such_module" in failed["broken library"].found and "GPU" in {one.name for one in found}  # a login node needs none
    assert site_check.check_site(options, site, recipe) == 1
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == f"{text.count('FAIL ')} check(s) failed"


def test_a_machine_that_is_fit_has_no_failure(bare: Path, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_check, "_PROBES", {"a library": "print(1)"})
    recipe = Recipe.model_validate({"data": {"shards": str(workplace.shards)}, "visual": {"weights": "none"}, "audio": {"weights": "none"}})
    site = Site(executor="local", device="cpu", parallel=1, cpus_per_rank=len(os.sched_getaffinity(0)))
    found = findings(CheckOptions(site="", out=str(bare / "runs")), site, recipe)
    assert {one.outcome for one in found} <= {"ok", "note"} and any("official" in one.found for one in found if one.name == "shards")
    crowded = findings(CheckOptions(site="", out=str(bare / "runs")), site.model_copy(update={"parallel": 99}), None)
    assert [(one.outcome, bool(one.remedy)) for one in crowded if one.name == "cores"] == [("note", True)]


def test_a_word_of_a_recipe_without_the_recipe_is_not_taken_for_checked() -> None:
    program = runpy.run_path(str(ROOT / "launch" / "check_site.py"))
    with pytest.raises(UsageError, match="nowhere` changes a recipe, and none is checked"):
        program["main"]([f"site={ROOT}/slurm/sites/local.yaml", "data.shards=/nowhere"])
