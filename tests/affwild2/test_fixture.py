"""The fixture on disk: plan, layout, labels; made once, the same for any number of workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmt_dist.affwild2 import fixture
from jmt_dist.affwild2.fixture import FixtureReport, make_fixture, plan_fixture, unit_rows
from jmt_dist.affwild2.fixture_gotchas import COSTLY, HARMLESS
from jmt_dist.affwild2.fixture_plan import UnitPlan, VideoPlan
from jmt_dist.affwild2.labels import read_labels
from jmt_dist.affwild2.layout import find_dataset
from jmt_dist.config import FixtureOptions
from jmt_dist.errors import UserError

from .made import labels_of

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {"units": 3, "test_units": 1, "rows": 64, "gotchas": "none"}


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# ---- plan


def test_default_plan_is_the_dataset_in_small() -> None:
    options = FixtureOptions(out="-")
    videos = plan_fixture(options)
    units = [u for v in videos for u in v.people]
    ordinary = [u for u in units if not u.gotcha]
    assert Counter(u.split for u in ordinary) == {"train": 16, "validation": 8, "test": 2}
    assert len({u.name for u in units}) == len(units) == len({u.identity for u in units})
    fps = Counter(v.fps for v in videos if not v.people[0].gotcha)
    assert fps[30] > sum(fps.values()) / 2 and set(fps) == {15, 24, 25, 30, 60}
    pairs = [tuple(u.name.removeprefix(v.stem) for u in v.people) for v in videos if len(v.people) == 2]
    assert sorted(pairs) == [("", "_right"), ("_left", "_right")]
    assert {v.suffix for v in videos} == {".mp4", ".avi"} and {v.batch for v in videos} == {"batch1", "batch2"}
    families = Counter("id" if "x" in v.stem and "-" in v.stem else "video" if v.stem.startswith("video") else "number" for v in videos)
    assert len(families) == 3 and min(families.values()) >= 8
    assert all(f"-{v.fps}-" in v.stem for v in videos if "-" in v.stem)


@pytest.mark.parametrize("units", [3, 4, 5, 7, 24, 60])
def test_every_number_of_units_has_both_splits(units: int) -> None:
    people = [u for v in plan_fixture(FixtureOptions(out="-", units=units, gotchas="none", test_units=0)) for u in v.people]
    splits = Counter(u.split for u in people)
    assert len(people) == units and splits["validation"] == max(1, units // 3) and splits["train"] == units - splits["validation"]
    assert sorted(u.number for u in people) == list(range(units))


# ---- labels and layout


def test_the_tree_is_read_as_what_was_planned(made: FixtureReport, plans: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    dataset = find_dataset(made.out)
    found = {u.name: u for u in dataset.units}
    assert set(found) == set(plans) == set(made.units)
    for name, (video, unit) in plans.items():
        assert (found[name].video, found[name].split) == (video.stem, unit.split)
        assert found[name].rows == unit.rows
        assert (found[name].media is None) == (unit.gotcha == "no-media")
        assert len(found[name].crops) == {"no-crops": 0, "split-folder": 2}.get(unit.gotcha, 1)


def test_labels_are_the_walk_in_range(made: FixtureReport, plans: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    for video, unit in plans.values():
        if unit.split == "test":
            continue
        text = labels_of(made.out, unit).read_bytes()
        if unit.gotcha.startswith("label-"):
            continue
        lines = text.decode().split("\n")
        assert lines[0] == "valence,arousal" and lines[-1] == "" and len(lines) == unit.rows + 2
        va = read_labels(labels_of(made.out, unit))
        assert va.shape == (unit.rows, 2) and np.nanmax(np.abs(va)) <= 1
        wanted = unit_rows(0, video, unit).labels
        assert np.array_equal(np.isnan(va), np.isnan(wanted)) and np.nanmax(np.abs(va - wanted)) < 1e-6


def test_manifest_says_which_gotcha_is_where(made: FixtureReport) -> None:
    held = json.loads((made.out / "fixture.json").read_text())
    named = Counter(u["gotcha"] for u in held["units"].values() if u["gotcha"])
    assert named == Counter(g.name for g in (*HARMLESS, *COSTLY) for _ in g.people)
    assert all(u["meaning"] for u in held["units"].values() if u["gotcha"])
    assert held["ceiling"]["both"]["average"] == made.ceiling["both"]["average"]
    assert not (made.out / ".unfinished").exists()


def test_default_ceilings_are_where_the_design_wants_them() -> None:
    options = FixtureOptions(out="-")
    held = fixture._manifest(options, plan_fixture(options))
    for part in (held["ceiling"], held["ceiling_by_split"]["validation"]):
        assert 0.84 < part["both"]["average"] < 0.93
        assert part["visual"]["valence"] > 0.8 and part["visual"]["arousal"] < 0.6
        assert part["audio"]["arousal"] > 0.8 and part["audio"]["valence"] < 0.6


def test_test_units_have_a_list_and_a_sample_file_and_no_labels(made: FixtureReport, plans: dict[str, tuple[VideoPlan, UnitPlan]]) -> None:
    names = sorted(n for n, (_, u) in plans.items() if u.split == "test")
    assert (made.out / fixture.TEST_LIST).read_text().splitlines() == names
    lines = (made.out / fixture.SAMPLE).read_text().splitlines()
    assert lines[0] == "image_location,valence,arousal"
    assert [line.split(",")[0] for line in lines[1:]] == [f"{n}/{k:05d}.jpg" for n in names for k in range(1, plans[n][1].rows + 1)]
    assert not [p for p in (made.out / "annotations").rglob("*.txt") if p.stem in names]


# ---- making


def test_same_bytes_for_any_number_of_workers_and_after_an_interruption(tmp_path: Path) -> None:
    make_fixture(FixtureOptions(out=str(tmp_path / "two"), workers=2, **TINY))
    reference = tree(tmp_path / "two")

    def stop(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    options = FixtureOptions(out=str(tmp_path / "one"), workers=1, **TINY)
    with pytest.raises(KeyboardInterrupt):
        make_fixture(options, stop)
    assert not (tmp_path / "one" / "fixture.json").exists()
    # what a kill in the midst of the third video may leave behind
    third = plan_fixture(options)[2].people[0].name
    (tmp_path / "one" / "cropped_aligned" / third).mkdir()
    (tmp_path / "one" / "cropped_aligned" / third / "00099.jpg").write_bytes(b"rest")
    done: list[int] = []
    assert make_fixture(options, lambda k, total, name: done.append(k)).made
    assert done == [3, 4]  # two were there
    assert tree(tmp_path / "one") == reference

    other = {**TINY, "seed": 1}
    make_fixture(FixtureOptions(out=str(tmp_path / "other"), workers=1, **other))
    changed = tree(tmp_path / "other")
    assert changed.keys() == reference.keys() and all(changed[p] != reference[p] for p in changed if p.endswith(".jpg"))


def test_second_run_does_nothing_and_others_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "f"
    make_fixture(FixtureOptions(out=str(out), workers=1, **TINY))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again = make_fixture(FixtureOptions(out=str(out), workers=2, **TINY), lambda *_: pytest.fail("made something"))
    assert not again.made and again.ceiling["both"]["average"] > 0 and len(again.units) == 4
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(UserError, match=r"other options \(rows=64\)"):
        make_fixture(FixtureOptions(out=str(out), workers=1, **{**TINY, "rows": 65}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty and not a fixture"):
        make_fixture(FixtureOptions(out=str(tmp_path / "mine"), **TINY))
    with pytest.raises(UserError, match="is a file"):
        make_fixture(FixtureOptions(out=str(tmp_path / "mine" / "thesis.tex"), **TINY))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_program(tmp_path: Path) -> None:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "shards/make_fixture.py", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    words = [f"out={tmp_path / 'f'}", "units=3", "rows=64", "test_units=0", "gotchas=none"]
    first = call(*words)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert "3 units (2 train, 1 validation, 0 test" in lines[0] and lines[-1] == str(tmp_path / "f")
    assert "3/3 videos" in lines and any(line.split()[0] == "both" for line in lines)
    assert "nothing to do" in call(*words).stdout
    wrong = call(*words, "unit=3")
    assert wrong.returncode == 2 and "`units`" in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1
