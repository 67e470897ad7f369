"""Fixtures that several rooms share: a real MLflow store."""

import os
import shutil

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before anything imports mlflow

import pytest

from jmt_dist.track.tracker import ParentRun, connect, create_experiment


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
