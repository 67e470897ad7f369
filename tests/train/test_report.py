"""status.json while the disk is full: people see less, training goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jmt_dist.train.report import Status

WHERE = {"stage": "visual", "epoch": 0, "steps": 9, "score": None}


def test_progress_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "fold"
    folder.write_text("no folder can be made here")
    status = Status(folder, "official")
    status.progress(step=1, **WHERE)
    with pytest.raises(OSError):
        status.set(state="done")  # the end must not be lost in silence
    folder.unlink()
    status.progress(step=9, **WHERE)
    assert json.loads((folder / "status.json").read_text())["step"] == 9
