"""From the synthetic dataset to a submission for its test split, by the programs a person runs (slow tier)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jmt_dist.affwild2.layout import find_dataset
from jmt_dist.evaluate.predict import read_predictions
from tests.evaluate.test_challenge import checked

ROOT = Path(__file__).parents[2]
TRAIN = [
    "engine.precision=fp32", "visual.size=16", "visual.batch=2", "audio.batch=2", "visual.max_steps=2", "audio.max_steps=2",
    "features.offsets=[0,1,2,3,4,5,6,7]", "features.dtype=float32", "fusion.validation_offsets=[0]", "fusion.offsets_per_epoch=1",
    "fusion.max_epochs=1", "fusion.seeds=[0]", "fusion.baselines=[]", "evaluate.offsets=[0,1,2,3,4,5,6,7]", "evaluate.test=true",
]  # fmt: skip


def program(name, *words):
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, words)], capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)  # 45 s of processor time; ten minutes were seen on a machine with much else to do
def test_the_fixtures_test_split_is_submitted(tmp_path):
    tree, shards, run = tmp_path / "tree", tmp_path / "shards", tmp_path / "run"
    program("shards/make_fixture.py", f"out={tree}", "units=6", "test_units=2", "rows=64", "gotchas=none", "workers=1")
    program("shards/pack_shards.py", f"source={tree}", f"out={shards}", "workers=1")
    where = [f"recipe={ROOT}/launch/recipes/demo.yaml", f"site={ROOT}/slurm/sites/local.yaml", "fold=official", f"out={run}"]
    program("launch/run_fold.py", *where, f"data.shards={shards}", *TRAIN)
    dataset = find_dataset(tree)
    submission = tmp_path / "new" / "challenge.txt"
    words = ["split=test", "folds=[official]", f"to={tmp_path}/test.parquet", f"sample={dataset.sample_file}", f"challenge={submission}"]
    printed = program("launch/predict_units.py", f"out={run}", *words)
    assert printed.splitlines()[-1] == str(submission)
    values = checked(submission, dataset.sample_file)
    units = {unit.name: unit for unit in dataset.units if unit.split == "test"}
    assert len(units) == 2 and len(values) == sum(unit.rows for unit in units.values())
    stored = read_predictions(run / "official" / "evaluate" / "jmt-seed0" / "test.parquet")
    for location, pair in values.items():
        unit, frame = location.split("/")
        assert [float(value) for value in pair] == pytest.approx(stored[unit].va[int(frame[:5]) - 1].tolist(), abs=1e-6)
    # the same unit as new material, without its shards
    name, unit = next(iter(units.items()))
    program("launch/predict_units.py", f"out={run}", f"crops={unit.crops[0]}", f"media={unit.media}", f"to={tmp_path}/new.parquet")
    again = next(iter(read_predictions(tmp_path / "new.parquet").values())).va[: unit.rows]
    # colours at the border of two frames of a strip are smoothed over it (4:2:0), which a crop by itself does not know
    assert np.abs(again - stored[name].va[: len(again)]).max() < 0.02
