"""Size and time of a run's model in the table of runs."""

from __future__ import annotations

import json
from pathlib import Path

from jmt_dist.report.tables import runs_table
from jmt_dist.track.compare import read_run


def test_parameters_and_time_come_from_the_first_fold_that_has_them(tmp_path: Path) -> None:
    for name, costs in (("a", {"jmt": {"parameters": 14_962_690, "ms_per_1000_clips": 81.6}}), ("b", {})):
        for fold in ("official", "fold-1"):
            folder = tmp_path / name / fold
            folder.mkdir(parents=True)
            metrics = {"fold": fold, "model": "jmt", "valence": 0.5, "arousal": 0.25, "average": 0.375}
            (folder / "metrics.json").write_text(json.dumps(metrics))
        (tmp_path / name / "fold-1" / "costs.json").write_text(json.dumps(costs))
    table = runs_table([read_run(tmp_path / "a"), read_run(tmp_path / "b")])
    places = [table.columns.index(column) for column in ("parameters", "ms per 1,000 clips")]
    assert [[row[place] for place in places] for row in table.rows] == [["14,962,690", "82"], ["–", "–"]]
