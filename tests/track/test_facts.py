"""What a fold's job says of itself, of its machine and of its results, by way of its spool."""

import json
import platform
import socket
import time
from importlib.metadata import version

import psutil
import pytest

from jmt_dist.config import Recipe, Site
from jmt_dist.recipe import build, word_layer
from jmt_dist.track.facts import flatten, record_start
from jmt_dist.track.replay import replay
from jmt_dist.track.results import record_results
from jmt_dist.track.spool import Spool, read_metrics, read_records
from jmt_dist.track.tracker import Tracker, create_child
from tests.report.runfolder import make_fold

RECIPE = build(Recipe, [word_layer("name=paper"), word_layer("fusion.batch=4")]).model_dump(mode="json")


def test_a_job_is_described_in_its_run_and_a_second_start_replaces_only_what_changed(store, tmp_path, monkeypatch):
    client, parent = store
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "snapshot.json").write_text(json.dumps({"commit": "ab" * 20, "dirty": ["config.py"], "sha256": "cd" * 32}))
    run_id, folder = create_child(parent, "fold-1"), tmp_path / "fold-1" / "spool"
    spool = Spool(folder)
    record_start(spool, tmp_path, RECIPE, {"manifest": "11", "fold.train": "22"})
    spool.close()
    first = replay(folder, client, run_id)
    run = client.get_run(run_id)
    assert run.data.params == flatten(RECIPE) and run.data.params["fusion.batch"] == "4" and first.params == len(run.data.params)
    tags = run.data.tags
    assert (tags["recipe"], tags["data.manifest"], tags["data.fold.train"]) == ("paper", "11", "22")
    assert (tags["code.commit"], tags["code.dirty"], tags["code.sha256"]) == ("ab" * 20, "true", "cd" * 32)
    assert tags["mlflow.source.git.commit"] == "ab" * 20 and tags["job.host"] == socket.gethostname()
    assert "job.slurm_id" not in tags and tags["versions.python"] == platform.python_version()
    assert tags["versions.torch"] == version("torch") and tags["versions.deepspeed"] == version("deepspeed")
    for name, value in (
        ("ARRAY_JOB_ID", "41"),
        ("ARRAY_TASK_ID", "3"),
        ("JOB_ID", "45"),
        ("RESTART_COUNT", "1"),
        ("JOB_NODELIST", "n[1-2]"),
    ):
        monkeypatch.setenv(f"SLURM_{name}", value)
    again = Spool(folder)  # requeued on other nodes, with the same recipe
    record_start(again, tmp_path, RECIPE, {"manifest": "11", "fold.train": "22"})
    again.close()
    second = replay(folder, client, run_id)
    tags = client.get_run(run_id).data.tags
    assert second.params == 0 and not second.refused and client.get_run(run_id).data.params == run.data.params
    assert (tags["job.slurm_id"], tags["job.slurm_restarts"], tags["job.nodes"]) == ("41_3", "1", "n[1-2]")


def test_a_job_without_a_snapshot_and_other_ranks(tmp_path):
    spool = Spool(tmp_path / "fold-1" / "spool")
    record_start(spool, tmp_path, RECIPE, {})
    tags = [record["g"] for _, record in read_records(tmp_path / "fold-1" / "spool") if "g" in record]
    assert len(tags) == 1 and not any(name.startswith("code.") for name in tags[0])
    record_start(Spool(None), tmp_path, RECIPE, {})
    record_results(Spool(None), tmp_path / "gone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fold-1"]


def test_the_machine_is_sampled_and_a_resumed_job_goes_on_with_the_steps(tmp_path):
    folder = tmp_path / "fold-1" / "spool"
    for start in (0, 1):
        with Tracker(folder, system_seconds=0.1) as tracker:
            wanted, deadline = tracker.spool.next_step("system/cpu_utilization_percentage") + 3, time.monotonic() + 60
            while tracker.spool.next_step("system/cpu_utilization_percentage") < wanted and time.monotonic() < deadline:
                time.sleep(0.05)
        assert not tracker.system.problem and not tracker.system._thread.is_alive()
        curves = read_metrics(folder)
        steps = [step for step, _ in curves["system/cpu_utilization_percentage"]]
        assert steps == list(range(len(steps))) and len(steps) >= wanted >= 3 + 3 * start
    total = psutil.virtual_memory().total / 1e6
    assert all(0 < value < total for _, value in curves["system/system_memory_usage_megabytes"])
    assert all(50 < value < total for _, value in curves["system/process_memory_megabytes"])  # an interpreter with MLflow
    for name in ("disk_available_megabytes", "network_receive_megabytes", "process_read_megabytes", "process_write_megabytes"):
        assert len(curves[f"system/{name}"]) == len(steps) and all(value >= 0 for _, value in curves[f"system/{name}"])
    written = [value for _, value in curves["system/process_write_megabytes"]]
    assert written == sorted(written) and written[-1] > 0


def test_a_monitor_that_fails_is_left_out_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "disk_usage", lambda path: 1 / 0)
    with Tracker(tmp_path / "spool", system_seconds=0.05) as tracker:
        deadline = time.monotonic() + 60
        while tracker.spool.next_step("system/cpu_utilization_percentage") < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    curves = read_metrics(tmp_path / "spool")
    assert "ZeroDivisionError" in tracker.system.problem
    assert "system/disk_usage_percentage" not in curves and len(curves["system/system_memory_usage_megabytes"]) >= 3


@pytest.mark.gpu
def test_the_gpu_is_sampled_and_named(tmp_path):
    folder = tmp_path / "spool"
    with Tracker(folder, system_seconds=0.2) as tracker:
        record_start(tracker.spool, tmp_path, RECIPE, {})
        deadline = time.monotonic() + 60
        while tracker.spool.next_step("system/gpu_0_utilization_percentage") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    curves = read_metrics(folder)
    assert all(0 <= value <= 100 for _, value in curves["system/gpu_0_utilization_percentage"])
    assert all(value > 0 for _, value in curves["system/gpu_0_power_usage_watts"])
    assert any("NVIDIA" in record.get("g", {}).get("job.gpu", "") for _, record in read_records(folder))


def test_the_machine_is_sampled_every_ten_seconds_unless_told_otherwise():
    assert Site().system_seconds == 10
    assert Tracker(None, system_seconds=1).system._thread is None


def test_results_of_a_fold_are_stored_as_files(store, tmp_path):
    client, parent = store
    make_fold(tmp_path, "official", seeds=2, baselines=("visual",), steps=60)
    folder = tmp_path / "official"
    for stage in ("visual", "fusion/jmt-seed0", "visual.0123456789abcdef"):  # the last one: of other settings, moved aside
        (folder / stage).mkdir(parents=True)
        (folder / stage / "done.json").write_text("{}")
    spool = Spool(folder / "spool")
    record_results(spool, folder)
    spool.close()
    run_id = create_child(parent, "official")
    report = replay(folder / "spool", client, run_id)
    assert report.artifacts == 1 + 2 + 4 + 2 and not report.missing and not report.left

    def stored(path=None):
        for entry in client.list_artifacts(run_id, path):
            yield from stored(entry.path) if entry.is_dir else [entry.path]

    runs = [f"evaluate/{run}/predictions.parquet" for run in ("jmt-seed0", "jmt-seed1", "visual-seed0", "visual-seed1")]
    figures = ["figures/learning-curves.png", "figures/predictions.png"]
    assert sorted(stored()) == sorted([*runs, *figures, "fusion/jmt-seed0/done.json", "metrics.json", "visual/done.json"])
    for name in figures:
        assert (folder / name).read_bytes()[:4] == b"\x89PNG" and (folder / name).stat().st_size > 10_000


def test_a_figure_that_cannot_be_drawn_costs_nothing_else(tmp_path, capfd):
    make_fold(tmp_path, "official", seeds=1, baselines=(), steps=60)
    folder = tmp_path / "official"
    (folder / "evaluate" / "jmt-seed0" / "predictions.parquet").write_bytes(b"torn")
    record_results(Spool(folder / "spool"), folder)
    said = capfd.readouterr().err
    assert "predictions.png could not be drawn" in said and not (folder / "figures" / "predictions.png").exists()
    assert (folder / "figures" / "learning-curves.png").is_file()
