"""MLflow's own pages on runs as our jobs write them, in headless Chromium (slow tier)."""

import html
import itertools
import json
import re
import shutil
import subprocess
from urllib.parse import quote

import pytest

from jmt_dist.config import Recipe
from jmt_dist.recipe import build, word_layer
from jmt_dist.track import names
from jmt_dist.track.facts import record_start
from jmt_dist.track.replay import replay
from jmt_dist.track.spool import Spool
from jmt_dist.track.tracker import connect, create_child, create_experiment
from tests.report.runfolder import make_fold
from tests.track.server import Server


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(server, experiment id, run ids and mean scores of the official fold of two experiments)."""
    server = Server("workers=1")
    server.start()
    client, found = connect(server.uri), []
    for name, words in (("paper", []), ("paper-lstm", ["fusion.model=lstm", "fusion.batch=8"])):
        out = tmp_path_factory.mktemp(name)
        recipe = build(Recipe, [word_layer(word) for word in (f"name={name}", *words)]).model_dump(mode="json")
        parent = create_experiment(server.uri, "papers", {}, recipe, run_name=name)
        run_id = create_child(parent, "official", of=name)
        metrics = make_fold(out, "official", seeds=1, baselines=(), steps=60)
        spool = Spool(out / "official" / "spool")
        record_start(spool, out, recipe, {"manifest": "11"})
        scores = [metrics[target] * (1 if name == "paper" else 0.5) for target in ("valence", "arousal", "average")]
        spool.metrics(names.ccc(names.RESULT, scores), 0)
        spool.close()
        assert not replay(out / "official" / "spool", client, run_id).left
        found.append((run_id, scores[2]))
    yield server, parent.experiment_id, found
    server.remove()


def text_of(server, page, folder):
    """What a person reads on a page of MLflow, cell by cell."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program, "the slow tier installs chromium"
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", "--window-size=1500,1700"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=30000", "--dump-dom"]
    done = subprocess.run([*command, f"{server.uri}/#/{page}"], capture_output=True, text=True, timeout=180)
    body = re.sub(r"<(script|style)\b.*?</\1>", "", done.stdout, flags=re.S)
    return [cell.strip() for cell in html.unescape(re.sub(r"<[^>]*>", "\n", body)).split("\n") if cell.strip()]


@pytest.mark.server
@pytest.mark.browser
def test_the_compare_page_shows_two_runs_as_a_person_looks_for_them(runs, tmp_path):
    server, experiment, found = runs
    ids = quote(json.dumps([run_id for run_id, _ in found]))
    cells = text_of(server, f"compare-runs?runs={ids}&experiments={quote(json.dumps([experiment]))}", tmp_path)
    assert "Comparing 2 Runs from 1 Experiment" in cells
    assert "paper/official" in cells and "paper-lstm/official" in cells

    def beside(name):
        places = [place for place, cell in enumerate(cells) if cell == name]
        return cells[places[-1] + 1 : places[-1] + 3]  # the last one is that of the table; before it, boxes to choose from

    assert beside("fusion.model") == ["jmt", "lstm"] and beside("fusion.batch") == ["2", "8"]
    table = cells[cells.index("Metrics") + 2 :]  # after its switch: the names, then the values of each run
    shown = list(itertools.takewhile(lambda cell: not re.fullmatch(r"-?[\d.e-]+", cell), table))
    assert {"val/ccc_valence", "val/ccc_arousal", "val/ccc_mean", "visual/train/loss", "visual/val/ccc_mean"} <= set(shown)
    values = sorted(float(cell) for cell in table[len(shown) : 3 * len(shown)])  # row by row or column by column: either is seen
    client = connect(server.uri)
    stored = sorted(client.get_run(run_id).data.metrics[name] for run_id, _ in found for name in shown)
    assert values == pytest.approx(stored, abs=6e-4)  # three decimals
    assert {round(score, 3) for _, score in found} <= set(values)


@pytest.mark.server
@pytest.mark.browser
def test_the_page_of_a_run_groups_its_curves_by_stage(runs, tmp_path):
    server, experiment, found = runs
    cells = text_of(server, f"experiments/{experiment}/runs/{found[0][0]}/model-metrics", tmp_path)
    for group in ("visual/train", "visual/val", "fusion/jmt-seed0/train", "val"):
        assert group in cells, cells
