"""What resume_jobs.py takes over from the last submission besides recipe and site."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jmt_dist.cluster import resume
from jmt_dist.errors import UserError
from tests.cluster.conftest import ROOT, Workplace


def finished(folder: Path) -> Path:
    """A run folder whose visual stage is done."""
    (folder / "official" / "visual").mkdir(parents=True)
    (folder / "official" / "visual" / "done.json").write_text("{}")
    return folder


def test_stages_shared_at_the_submission_are_shared_by_the_resumption(workplace: Workplace, tmp_path: Path) -> None:
    source, out = finished(tmp_path / "earlier run"), workplace.out()
    words = ["folds=[official]", f"share=['{source}']", "compare=false"]
    code, text = workplace.submit(out, *words, official={"raise_at": 1, "user": "no room"})
    assert code == 1 and f"official: visual is that of {source}" in next((out / "jobs").rglob("*_log.out")).read_text(), text
    shutil.rmtree(out / "official" / "visual")
    command = [sys.executable, "-c", "import tests.cluster.resume_toy", str(out)]
    answer = subprocess.run(command, cwd=ROOT, env=workplace.environment(), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (out / "official" / "visual" / "done.json").samefile(source / "official" / "visual" / "done.json")
    assert json.loads((out / "jobs.json").read_text())["share"] == [str(source)]


def test_a_sweep_keeps_them_too_but_not_those_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there, gone, bare, out = finished(tmp_path / "there"), tmp_path / "gone", tmp_path / "bare", tmp_path / "sweep"
    bare.mkdir()  # its folds were put elsewhere
    (out / "a").mkdir(parents=True)
    (out / "sweep.json").write_text('{"runs": ["a"], "variants": ["a"]}')
    (out / "site.yaml").write_text("name: here\n")
    (out / "a" / "recipe.yaml").write_text("name: a\n")
    (out / "a" / "jobs.json").write_text(json.dumps({"folds": ["official"], "share": [str(there), str(gone), str(bare)]}))
    seen: list[Any] = []
    monkeypatch.setattr(resume.sweep, "submit_recipes", lambda options, recipes, *_: seen.append((options, list(recipes))) or 0)
    assert resume.resume(out) == 0
    options, names = seen[0]
    assert (options.share, options.folds, names) == ([str(there)], ["official"], ["a"])
    said = capsys.readouterr().out
    assert all(f"share={folder} is no longer there" in said for folder in (gone, bare)) and f"share={there}" not in said


def test_a_source_that_could_share_nothing_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    from jmt_dist.cluster.share import check_sources

    with pytest.raises(UserError, match="is no folder"):
        check_sources([tmp_path / "rnus"], ["official"])
    with pytest.raises(UserError, match="holds none of these folds"):
        check_sources([finished(tmp_path / "run")], ["fold-1"])
    code, text = workplace.submit(workplace.out(), "folds=[official]", f"share=[{tmp_path}/rnus]", "dry=true")
    assert code == 1 and text.splitlines()[-1].endswith(
        f"share={tmp_path}/rnus is no folder. Name run folders, as submit_folds.py printed them."
    )
