"""Which runs a comparison is about: run folders by path, or the runs of an MLflow store by experiment and tag, their folders or not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jmt_dist.errors import UserError
from jmt_dist.track import names
from jmt_dist.track.compare import FOLDS, TARGETS, RunResult, ranked, read_run
from jmt_dist.track.tracker import SQLITE, ParentRun, client_environment, connect

METRICS, COSTS, RECIPE = "metrics.json", "costs.json", "recipe.yaml"


def run_folders(folder: Path) -> list[Path]:
    """The run folders inside a sweep's folder, the best first."""
    return [run.out for run in ranked([read_run(path.parent) for path in sorted(folder.glob("*/recipe.yaml"))])]


def distinct(runs: Sequence[RunResult]) -> list[RunResult]:
    """Runs of one name are also called by their folders: rows called alike could not be told apart, and a figure would lose one."""
    names = [run.name for run in runs]
    for folders in ([run.out.name for run in runs], [str(run.out) for run in runs]):
        often = Counter(names)
        names = [f"{run.name}: {at}" if often[name] > 1 else name for run, name, at in zip(runs, names, folders, strict=True)]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def paths(folders: Sequence[Path]) -> list[RunResult]:
    """Run folders, and the run folders inside those that are a sweep's, `distinct`. Raises UserError as `read_run`."""
    found = []
    for folder in folders:
        inner = [] if (folder / RECIPE).is_file() else run_folders(folder)
        found += [read_run(path) for path in inner or [folder]]
    return distinct(found)


def stored(uri: str, experiments: Sequence[str], tags: Mapping[str, str], scratch: Path) -> list[RunResult]:
    """The runs of an MLflow store in `experiments` (empty: all) that carry all `tags`, oldest first, `distinct`; runs of folds are theirs.

    A run whose folder (tag `folder`) is there is read from it. Of others recipe, scores and predictions come out of the store,
    into `<scratch>/<experiment>-<first digits of the run's id>`. Raises UserError where the store does not answer, has no such
    experiment, or no such run.
    """
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():  # connecting would make an empty one
        raise UserError(f"there is no tracking store {uri}", "Name the file that jobs wrote, such as sqlite:///runs/mlflow.db.")
    with client_environment(seconds=60):
        try:
            client = connect(uri)
            known = {one.name: one.experiment_id for one in client.search_experiments()}
            missing = [name for name in experiments if name not in known]
            if missing:
                raise UserError(f"there is no experiment `{missing[0]}` in {uri}", f"There are: {', '.join(sorted(known)) or 'none'}.")
            wanted = [known[name] for name in experiments] or list(known.values())
            runs = [run for run in _search(client, wanted) if _is_experiment(run) and _carries(run, tags)]
            found = [_result(client, run, scratch) for run in sorted(runs, key=lambda run: run.info.start_time)]
        except UserError:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"the tracking store {uri} cannot be read: {text}", "Name the run folders instead.") from error
    if not found:
        asked = ", ".join([*experiments, *(f"{key}={value}" for key, value in tags.items())]) or "of this package"
        raise UserError(f"no run of {uri} is {asked}", "Look at the tags of its runs in MLflow.")
    return distinct(found)


def _is_experiment(run: Any) -> bool:
    tags = run.data.tags
    return "mlflow.parentRunId" not in tags and "folder" in tags and tags.get("kind") != "comparison"


def _carries(run: Any, tags: Mapping[str, str]) -> bool:
    return all(run.data.tags.get(key) == value for key, value in tags.items())


def _search(client: Any, experiments: Sequence[str], text: str = "") -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs(list(experiments), text, max_results=1000, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found


def _result(client: Any, run: Any, scratch: Path) -> RunResult:
    folder, run_id = Path(run.data.tags["folder"]), run.info.run_id
    own = ParentRun.load(folder) if folder.is_dir() else None
    if own is not None and own.run_id == run_id:  # the folder may have been given to later work
        return read_run(folder)
    name = re.sub(r"[^\w.-]", "_", str(run.info.run_name))
    out = scratch / f"{name}-{run_id[:8]}"
    out.mkdir(parents=True, exist_ok=True)
    if not _fetch(client, run_id, RECIPE, out):
        (out / RECIPE).write_text(json.dumps({"name": str(run.info.run_name)}), encoding="utf-8")  # JSON is YAML
    children: dict[str, Any] = {}
    for child in _search(client, [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'"):
        fold = child.data.tags.get("fold", "")
        if fold not in children or child.info.start_time > children[fold].info.start_time:
            children[fold] = child
    for fold in FOLDS:
        _fetch_fold(client, run, children.get(fold), fold, out / fold)
    return read_run(out)


def _fetch_fold(client: Any, run: Any, child: Any, fold: str, folder: Path) -> None:
    """A fold's metrics.json, costs.json and predictions; without the first, its scores as metrics, of its own run or of the experiment's.

    What an earlier comparison fetched may be of a fold that has gone on since: only predictions of the same metrics stay.
    """
    before = (folder / METRICS).read_bytes() if (folder / METRICS).is_file() else b""
    for name in (METRICS, "status.json"):
        (folder / name).unlink(missing_ok=True)
    if child is None:
        sources = [(run.data.metrics, fold)]
    elif _fetch(client, child.info.run_id, METRICS, folder):
        _fetch(client, child.info.run_id, COSTS, folder)
        model, same = _model(folder / METRICS), (folder / METRICS).read_bytes() == before
        for part in client.list_artifacts(child.info.run_id, "evaluate"):
            if re.fullmatch(rf"evaluate/{re.escape(model)}-seed\d+", part.path):
                _fetch(client, child.info.run_id, f"{part.path}/predictions.parquet", folder, keep=same)
        return
    else:
        sources = [(child.data.metrics, names.RESULT), (run.data.metrics, fold)]
    for metrics, prefix in sources:
        values = [metrics.get(name) for name in names.ccc(prefix, (0.0, 0.0, 0.0))]
        if None not in values:
            folder.mkdir(parents=True, exist_ok=True)
            score = {**dict(zip(TARGETS, values, strict=True)), "model": run.data.params.get("fusion.model", "")}
            (folder / METRICS).write_text(json.dumps(score), encoding="utf-8")
            return
    if child is not None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {"state": child.info.status.lower(), "reason": "no scores in MLflow"}
        (folder / "status.json").write_text(json.dumps(state), encoding="utf-8")


def _model(metrics: Path) -> str:
    return str(json.loads(metrics.read_text(encoding="utf-8")).get("model", ""))


def _fetch(client: Any, run_id: str, path: str, folder: Path, keep: bool = False) -> bool:
    """Download an artifact to `<folder>/<path>`, with `keep` unless a file of its size is there; False where the run has none."""
    parent, target = str(Path(path).parent), folder / path
    found = next((one for one in client.list_artifacts(run_id, None if parent == "." else parent) if one.path == path), None)
    if found is None:
        return False
    if not (keep and target.is_file() and target.stat().st_size == found.file_size):
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download_artifacts(run_id, path, str(target.parent))  # a single file goes into the folder itself, whatever its path
    return True
