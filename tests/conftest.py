"""Fixtures that several rooms share: a real MLflow store, a synthetic dataset with every irregularity."""

import os
import shutil

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before anything imports mlflow

import pytest

from jmt_dist.affwild2.fixture import make_fixture
from jmt_dist.config import FixtureOptions
from jmt_dist.track.tracker import ParentRun, connect, create_experiment

IRREGULAR = FixtureOptions(out="irregular", units=9, rows=64, gotchas="all", workers=2)


@pytest.fixture(scope="session")
def irregular(tmp_path_factory):
    """FixtureReport of the fixture with every irregularity of the real dataset, one tiny unit each; to be read only."""
    return make_fixture(IRREGULAR.model_copy(update={"out": str(tmp_path_factory.mktemp("irregular") / IRREGULAR.out)}))


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A real SQLite store with one experiment: made once, since its 50 migrations take seconds."""
    folder = tmp_path_factory.mktemp("template")
    parent = create_experiment(f"sqlite:///{folder}/mlflow.db", "demo", {"kind": "folds"}, {"seed": 0}, folder / "artifacts")
    return folder, parent


@pytest.fixture
def store(template, tmp_path):
    """(client, parent run) of a fresh copy of the store."""
    source, parent = template
    shutil.copy(source / "mlflow.db", tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return connect(uri), ParentRun(uri, parent.experiment_id, parent.run_id)
