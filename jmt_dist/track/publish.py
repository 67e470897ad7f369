"""Stores what a comparison wrote in MLflow: tables, report and scores in the experiment's run, or in a run of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jmt_dist.errors import UserError
from jmt_dist.track import names
from jmt_dist.track.compare import RunResult, folds_mean
from jmt_dist.track.patience import Patient
from jmt_dist.track.tracker import ParentRun, client_environment, connect, create_experiment

GOES_ON = ("running", "waiting", "pending")


def publish_run(run: RunResult, files: Sequence[Path]) -> str:
    """Store files and scores in the run of an experiment, if it has one; returns what went wrong, "" if nothing."""
    return _explained(run.out, lambda parent: _log_run(run, parent, files))


def publish_comparison(runs: Sequence[RunResult], out: Path, files: Sequence[Path]) -> str:
    """Store the comparison of several experiments as a run in the experiment `comparisons`; returns what went wrong.

    It goes to the store of the first of them that has one, and is remembered in `<out>/parent_run.json`: comparing again
    writes the same run. Metrics are `<run>/official/ccc_mean`, … and `<run>/folds_mean/ccc_mean`, ….
    """
    try:
        if ParentRun.load(out) is None:
            first = next((found for run in runs if (found := ParentRun.load(run.out)) is not None), None)
            if first is None:
                return ""
            tags = {"kind": "comparison", "folder": str(out.resolve()), "mlflow.note.content": _note(runs)}
            root = out.parent / "mlartifacts" if first.uri.startswith("sqlite:") else None
            create_experiment(first.uri, "comparisons", tags, {"runs": [run.name for run in runs]}, root, out.name).save(out)
    except UserError as error:
        return str(error)
    return _explained(out, lambda parent: _log_comparison(runs, parent, files))


def _explained(out: Path, log: Any) -> str:
    parent: ParentRun | None = None
    try:
        parent = ParentRun.load(out)
        if parent is not None:
            with client_environment(seconds=60):
                log(parent)
    except UserError as error:
        return str(error)
    except Exception as error:
        uri = parent.uri if parent else ""
        return f"MLflow ({uri}) did not take the report: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _log_run(run: RunResult, parent: ParentRun, files: Sequence[Path]) -> None:
    client = Patient(connect(parent.uri))
    _log(client, parent.run_id, _points(run, ""), [*files, *(path for path in (run.out / "recipe.yaml",) if path.is_file())])
    reasons = [row.reason for row in run.missing]
    if any(reason.startswith(GOES_ON) for reason in reasons):
        return
    if any(reason.startswith("failed") for reason in reasons):
        client.set_terminated(parent.run_id, "FAILED")
    else:
        client.set_terminated(parent.run_id, "KILLED" if any(reason.startswith("stopped") for reason in reasons) else "FINISHED")


def _log_comparison(runs: Sequence[RunResult], parent: ParentRun, files: Sequence[Path]) -> None:
    client = Patient(connect(parent.uri))
    points: dict[str, tuple[float, int]] = {}
    for run in runs:
        points |= _points(run, f"{run.name}/")
    _log(client, parent.run_id, points, files)
    client.set_terminated(parent.run_id, "FINISHED")


def _points(run: RunResult, prefix: str) -> dict[str, tuple[float, int]]:
    """(value, time in ms) by name. The time is that of the result, not of this comparison: comparing again adds no points."""
    found: dict[str, tuple[float, int]] = {}
    for row in run.folds:
        if row.score is not None:
            when = int((run.out / row.fold / "metrics.json").stat().st_mtime * 1000)
            found |= {name: (value, when) for name, value in names.ccc(f"{prefix}{row.fold}", row.score.values()).items()}
    mean = folds_mean(run)
    if mean is not None and found:
        when = max(time for _, time in found.values())
        for group, values in zip(("folds_mean", "folds_std"), mean, strict=True):
            found |= {name: (value, when) for name, value in names.ccc(f"{prefix}{group}", values).items()}
    return found


def _log(client: Any, run_id: str, points: Mapping[str, tuple[float, int]], files: Sequence[Path]) -> None:
    from mlflow.entities import Metric

    from jmt_dist.track.replay import metric_name

    metrics = [Metric(metric_name(name), value, when, 0) for name, (value, when) in points.items()]
    for start in range(0, len(metrics), 900):
        client.log_batch(run_id, metrics=metrics[start : start + 900])
    for path in files:
        client.log_artifact(run_id, str(path))


def _note(runs: Sequence[RunResult]) -> str:
    return "Compared:\n" + "\n".join(f"* {run.name}: {run.out.resolve()}" for run in runs)
