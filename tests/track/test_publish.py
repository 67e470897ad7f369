"""Comparisons in MLflow: those of a sweep in a run of their own, and the end of an experiment's run."""

import json

import pytest

from jmt_dist.report.select import paths
from jmt_dist.report.write import compare_runs
from jmt_dist.track.compare import FOLDS, read_run
from jmt_dist.track.publish import publish_run
from jmt_dist.track.tracker import ParentRun
from tests.report.test_write import ALL, make_light


def test_a_sweep_is_one_run_however_often_it_is_compared(store, tmp_path):
    client, parent = store
    sweep = tmp_path / "sweep"
    runs = [make_light(sweep / name, scores, (f"name={name}",)) for name, scores in (("a", ALL), ("b (2)", {**ALL, "fold-1": (0.9, 0.8)}))]
    unranked = ["ranking: there is no fold of which all runs have predictions"]
    assert compare_runs(paths(runs), sweep).omissions == unranked and ParentRun.load(sweep) is None  # neither is tracked anywhere
    for run in runs:
        parent.save(run)
    for _ in range(2):
        assert compare_runs(paths(runs), sweep).omissions == unranked
    found = client.search_runs([client.get_experiment_by_name("comparisons").experiment_id])
    assert [run.info.run_name for run in found] == ["sweep"] and found[0].info.status == "FINISHED"
    run_id = found[0].info.run_id
    assert ParentRun.load(sweep).run_id == run_id
    metrics = found[0].data.metrics
    assert len(metrics) == 2 * 3 * (len(FOLDS) + 2)
    assert metrics["a/official/ccc_valence"] == 0.5 and metrics["b _2_/fold-1/ccc_mean"] == pytest.approx(0.85)
    assert metrics["b _2_/folds_mean/ccc_arousal"] == pytest.approx((4 * 0.6 + 0.8) / 5)
    assert len(client.get_metric_history(run_id, "a/folds_std/ccc_mean")) == 1
    assert {f.path for f in client.list_artifacts(run_id)} == {"comparison.csv", "comparison.md", "comparison.tex", "report.html"}


def test_a_sweep_whose_store_is_away_is_compared_all_the_same(tmp_path):
    run = make_light(tmp_path / "sweep" / "a", ALL)
    ParentRun("http://127.0.0.1:1", "0", "0" * 32).save(run)
    result = compare_runs(paths([run]), tmp_path / "sweep")
    assert len(result.omissions) == 1 and "the tracking store http://127.0.0.1:1 cannot be used" in result.omissions[0]
    assert (tmp_path / "sweep" / "comparison.csv").is_file() and ParentRun.load(tmp_path / "sweep") is None


@pytest.mark.parametrize(
    ("states", "end"),
    [
        ({}, "FINISHED"),  # folds that were not asked for are no failure
        ({"fold-1": "failed", "fold-2": "stopped"}, "FAILED"),
        ({"fold-1": "stopped"}, "KILLED"),
        ({"fold-1": "failed", "fold-2": "running"}, "RUNNING"),
        ({"fold-1": "waiting"}, "RUNNING"),
    ],
)
def test_an_experiment_ends_as_its_folds_did(store, tmp_path, states, end):
    client, parent = store
    out = make_light(tmp_path / "run", {"official": (0.5, 0.6)})
    for fold, state in states.items():
        (out / fold).mkdir()
        (out / fold / "status.json").write_text(json.dumps({"state": state}))
    parent.save(out)
    assert publish_run(read_run(out), []) == ""
    assert client.get_run(parent.run_id).info.status == end
