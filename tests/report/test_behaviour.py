"""What a missing modality costs, and how saturated attention is, in the tables of one run and of several."""

from __future__ import annotations

import json
from pathlib import Path

from jmt_dist.report.write import compare_run, compare_runs
from jmt_dist.track.compare import read_run

WITHOUT = {"audio": {"average": 0.1}, "visual": {"average": 0.375}}


def write(out: Path, fold: str, model: str, **more: object) -> Path:
    metrics = {"fold": fold, "model": model, "valence": 0.5, "arousal": 0.25, "average": 0.375, **more}
    (out / fold).mkdir(parents=True)
    (out / fold / "metrics.json").write_text(json.dumps(metrics))
    return out


def test_a_run_and_its_baselines_say_what_they_lose(tmp_path: Path) -> None:
    baseline = {"valence": 0.5, "arousal": 0.5, "average": 0.5, "saturation": {"start": 0.0, "end": 0.0251}}
    write(tmp_path, "official", "jmt", withheld=WITHOUT, saturation={"start": 0.831, "end": 0.9}, baselines={"audio": baseline})
    write(tmp_path, "fold-1", "jmt")  # scored before there was such a thing
    found = [table for table in compare_run(tmp_path).tables if table.title.startswith("A missing modality")]
    assert [table.title for table in found] == ["A missing modality, and attention"]
    assert found[0].columns == ("system", "average", "without audio", "without face", "saturated weights")
    assert found[0].rows == (
        ("official: jmt", "0.375", "0.100 (−0.275)", "0.375 (+0.000)", "0.83 → 0.90"),
        ("official: audio", "0.500", "–", "–", "0.00 → 0.03"),
        ("fold-1: jmt", "0.375", "–", "–", "–"),
    )
    for name in ("table1.md", "table1.tex", "report.html"):
        assert "without face" in (tmp_path / name).read_text(), name


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    runs = [read_run(write(tmp_path / model, "fold-1", model, withheld=WITHOUT)) for model in ("jmt", "gated")]
    assert [table.title for table in compare_runs(runs, tmp_path / "of-no-common-fold").tables] == ["Runs compared"]
    official = [read_run(write(tmp_path / "o" / model, "official", model, withheld=WITHOUT)) for model in ("jmt", "gated")]
    rows = compare_runs(official, tmp_path / "both").tables[-1].rows
    assert [row[:4] for row in rows] == [(name, "0.375", "0.100 (−0.275)", "0.375 (+0.000)") for name in ("jmt", "gated")]
