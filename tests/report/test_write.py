import csv
import html
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from plotly.graph_objects import Figure as Plot

from jmt_dist.config import Recipe
from jmt_dist.errors import UserError
from jmt_dist.recipe import build, dump, word_layer
from jmt_dist.report import figures
from jmt_dist.report.select import paths, run_folders
from jmt_dist.report.tables import changed_keys, markdown, table1, table1_csv
from jmt_dist.report.traces import choose_units
from jmt_dist.report.units import fold_predictions, unit_results
from jmt_dist.report.write import compare_run, compare_runs, show
from jmt_dist.track.compare import FOLDS, PAPER_TABLE1, read_ceilings, read_run
from jmt_dist.track.facts import record_start
from jmt_dist.track.spool import Spool, read_metrics
from jmt_dist.track.tracker import ParentRun
from tests.report.runfolder import make_fixture_json, make_run

ROOT = Path(__file__).parents[2]
ALL = dict.fromkeys(FOLDS, (0.5, 0.6))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run folder, its metrics, and what the comparison made of it."""
    base = tmp_path_factory.mktemp("runs")
    metrics = make_run(base / "demo", seeds=2)
    return base / "demo", metrics, compare_run(base / "demo", make_fixture_json(base / "fixture.json"))


def make_light(out, scores, words=("name=light",)):
    """A run folder that holds metrics only."""
    out.mkdir(parents=True)
    dump(build(Recipe, [word_layer(word) for word in words]), out / "recipe.yaml")
    for fold, (v, a) in scores.items():
        (out / fold).mkdir()
        metrics = {"model": "jmt", "valence": v, "arousal": a, "average": (v + a) / 2, "interval": None}
        (out / fold / "metrics.json").write_text(json.dumps(metrics))
    return out


def test_paper_numbers_are_consistent():
    assert list(PAPER_TABLE1) == list(FOLDS)
    for fold, (valence, arousal, average) in PAPER_TABLE1.items():
        assert average == pytest.approx((valence + arousal) / 2, abs=1.1e-3), fold  # the paper cuts or rounds to three decimals


def test_csv_has_exactly_the_six_rows(whole):
    out, metrics, _ = whole
    with open(out / "table1.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["fold", "valence", "arousal", "average"] and [row[0] for row in rows[1:]] == list(FOLDS)
    for fold, *values in rows[1:]:
        assert [float(v) for v in values] == pytest.approx([metrics[fold][t] for t in ("valence", "arousal", "average")], abs=1e-6)


def test_table_shows_intervals_paper_and_mean(whole):
    out, metrics, result = whole
    table = result.tables[0]
    low, high = metrics["official"]["interval"]["valence"]
    assert table.rows[0][1] == f"{metrics['official']['valence']:.3f} [{low:.3f}, {high:.3f}]"
    assert table.rows[0][4:] == ("0.717", "0.614", "0.666")
    averages = [metrics[fold]["average"] for fold in FOLDS[1:]]
    assert table.rows[6][0] == "mean of 5 folds"
    assert table.rows[6][3] == f"{statistics.mean(averages):.3f} ± {statistics.stdev(averages):.3f}"
    assert table.rows[6][6] == "0.679 ± 0.027"
    best = max(range(6), key=lambda i: metrics[FOLDS[i]]["valence"])
    assert {(best, 1), (4, 4), (4, 6), (1, 5)} < table.bold  # the last three are those the paper itself prints bold
    text = (out / "table1.md").read_text()
    assert "**0.760**" in text and f"**{table.rows[best][1]}**" in text and result.omissions == []


def test_baselines_and_ceilings_on_the_official_fold(whole):
    _, metrics, result = whole
    assert [table.title for table in result.tables[1:]] == ["Systems on fold official", "Best and worst units of fold official"]
    rows = result.tables[1].rows
    names = [f"{name} (mean of 2 seeds)" for name in ("jmt", "visual", "audio")]
    assert [row[0] for row in rows] == [*names, "ceiling: visual", "ceiling: audio", "ceiling: both"]
    spread = statistics.stdev([seed["valence"] for seed in metrics["official"]["seeds"]])
    assert rows[0][4].startswith(f"{spread:.3f} / ") and rows[5][1:4] == ("0.920", "0.900", "0.910")


class Resources(HTMLParser):
    """What a page would load, and its elements."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data", "poster")]


def drawn(text):
    """The figures of a report, by caption or unit, as plotly.js gets them: each one is what plotly's own schema allows."""
    values = json.JSONDecoder().raw_decode(text, text.rindex("const figures = ") + len("const figures = "))[0]
    names = dict(re.findall(r'<h[23]>([^<]*)</h[23]>(?:<figure>|<div class="unit[^"]*">)<div id="(figure\d+)"', text))
    assert set(names.values()) == set(values)
    return {html.unescape(name): Plot(values[key]) for name, key in names.items()}


def test_report_needs_no_other_file(whole):
    out, _, _ = whole
    text = (out / "report.html").read_text()
    page = Resources()
    page.feed(text)
    assert page.found == ["data:,"] and page.tags.count("script") == 2 and "iframe" not in page.tags
    assert "@import" not in text.split("<script>")[0] and "url(" not in text.split("<script>")[0]
    assert "Table 1" in text and "0.717" in text and "fusion.batch = 2" in text and str(out) in text


def test_figures_show_the_numbers(whole):
    out, metrics, _ = whole
    figures = drawn((out / "report.html").read_text())
    tables = [pq.read_table(out / "official" / "evaluate" / f"jmt-seed{seed}" / "predictions.parquet").to_pandas() for seed in (0, 1)]
    frames = tables[0]
    frames[["valence", "arousal"]] = (frames[["valence", "arousal"]] + tables[1][["valence", "arousal"]]) / 2
    squares = (frames.valence - frames.valence_label) ** 2 + (frames.arousal - frames.arousal_label) ** 2
    errors = (squares.groupby(frames.unit.astype(str)).mean() / 2) ** 0.5
    by_error = errors.sort_values().index.tolist()
    assert [name.split(":")[0].split(",")[0].split(".")[0] for name in figures] == [
        "Folds beside the paper's numbers; lines", "Systems on fold official", "Learning curves", "Prediction against label", "Circumplex",
        "Error by unit", *by_error[:2], *by_error[-2:],
    ]  # fmt: skip
    bars = next(iter(figures.values())).data
    assert [bar.y[0] for bar in bars[:3]] == pytest.approx([metrics["official"][t] for t in ("valence", "arousal", "average")], abs=1e-4)
    low, high = metrics["fold-2"]["interval"]["arousal"]
    assert bars[1].y[2] + bars[1].error_y.array[2] == pytest.approx(high, abs=2e-4)
    assert bars[1].y[2] - bars[1].error_y.arrayminus[2] == pytest.approx(low, abs=2e-4)
    assert list(bars[3].y) == [PAPER_TABLE1[fold][0] for fold in FOLDS]
    density = figures["Prediction against label, fold official"].data[0]
    assert sum(map(sum, density.text)) == frames.valence_label.notna().sum()
    assert sum(count for row in density.text for count in row[:25]) == pytest.approx((frames.valence_label < 0).sum(), abs=2)
    assert sum(count for row in density.text[:25] for count in row) == pytest.approx(
        (frames.valence[frames.valence_label.notna()] < 0).sum(), abs=2
    )
    best = by_error[0]
    trace = figures[next(name for name in figures if name.startswith(best))].data
    unit = frames[frames.unit == best]
    assert list(trace[0].x) == list(range(1, len(unit) + 1))
    assert trace[0].y[100] == pytest.approx(unit.valence_label.to_numpy()[100], abs=1e-3)
    assert trace[3].y[100] == pytest.approx(unit.arousal.to_numpy()[100], abs=1e-3)
    assert trace[2].y[0] is None  # no label: a gap in the line
    shown = figures[next(name for name in figures if name.startswith("Error by unit"))].data[0]
    assert list(shown.text) == by_error and list(shown.y) == pytest.approx(errors.sort_values().tolist(), abs=1e-4)
    with open(out / "units.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 5 and [row["unit"] for row in rows[:5]] == by_error
    row = next(row for row in rows if row["unit"] == "video2_left" and row["fold"] == "official")
    unit = frames[(frames.unit == "video2_left") & frames.valence_label.notna()]
    assert (row["video"], int(row["labelled"]), row["fps"]) == ("video2", len(unit), "")
    assert float(row["pearson_arousal"]) == pytest.approx(np.corrcoef(unit.arousal, unit.arousal_label)[0, 1], abs=1e-5)
    assert float(row["sign_valence"]) == pytest.approx(np.mean(np.sign(unit.valence) == np.sign(unit.valence_label)), abs=1e-5)


def test_unfinished_folds_are_rows_not_crashes(tmp_path):
    out = make_light(tmp_path / "run", {"official": (0.5, 0.6), "fold-1": (0.4, 0.5), "fold-2": (0.3, 0.4)})
    (out / "fold-2" / "status.json").write_text(json.dumps({"state": "running", "stage": "fusion"}))  # its metrics are of earlier work
    (out / "fold-3").mkdir()
    (out / "fold-3" / "status.json").write_text(json.dumps({"state": "failed", "stage": "visual", "reason": "out of memory <b>"}))
    (out / "fold-4").mkdir()
    (out / "fold-4" / "metrics.json").write_text('{"valence": NaN, "arousal": 0.5, "average": 0.5}')
    result = compare_run(out)
    failed = "failed in visual (out of memory <b>)"
    assert result.omissions == [
        "fold-2: running in fusion",
        f"fold-3: {failed}",
        "fold-4: metrics.json cannot be read",
        "fold-5: not run",
    ]
    assert (out / "table1.csv").read_text().splitlines()[2:4] == ["fold-1,0.400000,0.500000,0.450000", "fold-2,nan,nan,nan"]
    rows = result.tables[0].rows
    assert rows[3][1:4] == (failed, "", "") and rows[6][:2] == ("mean of 1 fold", "–")
    page = (out / "report.html").read_text()
    assert "out of memory &lt;b&gt;" in page and "Missing here" in page
    nothing = make_light(tmp_path / "nothing", {})
    assert len(compare_run(nothing).omissions) == 6
    assert all(math.isnan(float(cell)) for line in (nothing / "table1.csv").read_text().splitlines()[1:] for cell in line.split(",")[1:])


def test_folds_of_other_settings_are_named(tmp_path):
    """As where another recipe was submitted to the folder for one fold: recipe.yaml is then that one's."""
    out = make_light(tmp_path / "run", {"official": (0.5, 0.6), "fold-1": (0.4, 0.5), "fold-2": (0.3, 0.4)}, ("fusion.optimizer.lr=1e-5",))
    same = ["fusion.optimizer.lr=1e-5", "stages=[evaluate]", "visual.keep=1", "features.batch=3"]
    jobs = {"official": same, "fold-1": [], "fold-2": None}
    for fold, words in jobs.items():
        spool = Spool(out / fold / "spool")
        if words is not None:
            record_start(spool, out, build(Recipe, [word_layer(f"seed={3 * (fold == 'official')}")]).model_dump(mode="json"), {})
            record_start(spool, out, build(Recipe, [word_layer(word) for word in words]).model_dump(mode="json"), {})  # its last one
            visual = build(Recipe, [word_layer("stages=[visual]"), word_layer("seed=9")]).model_dump(mode="json")
            record_start(spool, out, visual, {})  # which made no scores
        spool.close()
    said = [line for line in compare_run(out).omissions if "recipe" in line]
    assert said == ["fold-1 by this recipe: what is shown was made with fusion.optimizer.lr=0.0005"]


def test_a_figure_that_fails_is_an_omission(tmp_path):
    out = make_light(tmp_path / "run", ALL)
    (out / "official" / "evaluate" / "jmt-seed0").mkdir(parents=True)
    (out / "official" / "evaluate" / "jmt-seed0" / "predictions.parquet").write_bytes(b"torn")
    result = compare_run(out)
    assert len(result.omissions) == 2 and all("not a predictions file" in line for line in result.omissions)
    assert [line.split(":")[0] for line in result.omissions] == ["smoothing", "predictions of official"]
    assert (out / "report.html").is_file()


def test_wrong_folders_give_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no run folder"):
        read_run(tmp_path / "gone")
    with pytest.raises(UserError, match="is no run folder"):
        read_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"recipe\.yaml cannot be read"):
        read_run(tmp_path)
    (tmp_path / "fixture.json").write_text("{}")
    with pytest.raises(UserError, match="holds no ceilings"):
        read_ceilings(tmp_path / "fixture.json")
    with pytest.raises(UserError, match=r"is no fixture\.json"):
        read_ceilings(tmp_path / "gone.json")


def test_traces_are_the_mean_over_the_recipes_seeds(whole):
    out, _, _ = whole
    run = read_run(out)
    stray = out / "official" / "evaluate" / "jmt-seed9"  # left by a recipe with other seeds
    stray.mkdir()
    (stray / "predictions.parquet").write_bytes(b"")
    files = run.predictions("official", "jmt")
    assert [path.parent.name for path in files] == ["jmt-seed0", "jmt-seed1"]
    predictions = fold_predictions(run, "official")
    parts = [table[table.unit == "video1"] for table in (pq.read_table(path).to_pandas() for path in files)]
    assert predictions["video1"].va[:, 1] == pytest.approx((parts[0].arousal.to_numpy() + parts[1].arousal.to_numpy()) / 2, abs=1e-6)
    assert len(predictions["video1"].labels) == 400
    units = unit_results("official", predictions, {})
    assert [unit.unit for unit in choose_units(units, ["video1"])] == ["video1"]
    with pytest.raises(UserError, match=r"does not validate on unit video9\. Its units: 10-60-1280x720, 134"):
        choose_units(units, ["video9"])


def test_several_runs_side_by_side(tmp_path):
    a = make_light(tmp_path / "sweep" / "a", ALL, ("name=a", "fusion.optimizer.lr=0.001"))
    scores = {**ALL, "official": (0.6, 0.7), "fold-1": (0.8, 0.8)}
    b = make_light(tmp_path / "sweep" / "b", scores, ("name=b", "fusion.optimizer.lr=0.01"))
    c = make_light(tmp_path / "sweep" / "c", {"official": (0.1, 0.2)}, ("name=c | d",))
    assert run_folders(tmp_path / "sweep") == [b, a, c]  # the best first, then those that lack folds
    assert changed_keys([read_run(folder) for folder in (a, b)]) == ["fusion.optimizer.lr"]
    result = compare_runs(paths([a, b, c]), tmp_path / "sweep")
    table = result.tables[0]
    assert table.columns[-1] == "fusion.optimizer.lr" and [row[-1] for row in table.rows] == ["0.001", "0.01", "0.0005"]
    assert table.rows[0][1:6] == ("0.500", "0.600", "0.550", "0.550 ± 0.000", "6 of 6") and table.rows[2][4:6] == ("–", "1 of 6")
    assert (1, 3) in table.bold and (1, 4) in table.bold
    assert result.omissions == [
        "c | d, fold-1, fold-2, fold-3, fold-4, fold-5: not run",
        "ranking: there is no fold of which all runs have predictions",
    ]
    lines = (tmp_path / "sweep" / "comparison.csv").read_text().splitlines()
    assert len(lines) == 19 and lines[7] == "b,official,0.600000,0.700000,0.650000,nan,nan"
    assert "c \\| d" in markdown(table) and len(drawn((tmp_path / "sweep" / "report.html").read_text())) == 1


def test_scores_and_files_reach_the_parent_run_once(store, tmp_path):
    client, parent = store
    out = make_light(tmp_path / "run", ALL)
    parent.save(out)
    for _ in range(2):
        assert compare_run(out).omissions == []
    run = client.get_run(parent.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["fold-3/ccc_arousal"] == 0.6
    assert run.data.metrics["folds_mean/ccc_mean"] == pytest.approx(0.55)
    assert len(client.get_metric_history(parent.run_id, "official/ccc_valence")) == 1
    assert sorted(f.path for f in client.list_artifacts(parent.run_id)) == [
        "recipe.yaml",
        "report.html",
        "table1.csv",
        "table1.md",
        "table1.tex",
    ]


def test_what_is_printed_ends_with_the_reports_path(store, tmp_path, capsys):
    out = make_light(tmp_path / "my run", ALL)
    uri = f"sqlite:///{tmp_path}/my runs.db"  # a command to copy, whatever paths are called
    shutil.copy(store[1].uri.removeprefix("sqlite:///"), tmp_path / "my runs.db")
    replace(store[1], uri=uri).save(out)
    show(compare_run(out))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(out / "report.html")
    [command] = [shlex.split(line.removeprefix("learning curves: ")) for line in lines if line.startswith("learning curves: ")]
    assert command[1:] == ["ui", "--backend-store-uri", uri]


def test_a_store_that_is_away_is_an_omission(tmp_path):
    out = make_light(tmp_path / "run", ALL)
    ParentRun("http://127.0.0.1:1", "0", "0" * 32).save(out)
    result = compare_run(out)
    assert len(result.omissions) == 1 and "MLflow (http://127.0.0.1:1) did not take the report" in result.omissions[0]
    assert len(result.files) == 4 and table1_csv(read_run(out)) == (out / "table1.csv").read_text()


def program(name, *words):
    return subprocess.run([sys.executable, str(ROOT / "launch" / name), *words], capture_output=True, text=True, timeout=120)


def test_program(whole, tmp_path):
    out, _, _ = whole
    done = program("compare_runs.py", f"out={out}", f"fixture={out.parent / 'fixture.json'}")
    assert done.returncode == 0, done.stderr
    assert "mean of 5 folds" in done.stdout and "ceiling: both" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1] == str(out / "report.html")
    assert sum(line.count("[") == 3 for line in done.stdout.splitlines() if "│ fold-" in line) == 5  # rows are not folded in a log
    light = make_light(tmp_path / "sweep" / "a", {"official": (0.5, 0.6)})
    done = program("compare_runs.py", f"out={light.parent}")
    assert done.returncode == 0 and "missing" not in done.stdout  # of several runs, folds that none has begun were not asked for
    done = program("compare_runs.py", f"runs=[{light}]")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("compare_runs.py: `out` is missing. Write out=")


def test_table1_of_a_single_fold_has_nothing_bold(tmp_path):
    run = read_run(make_light(tmp_path / "run", {"official": (0.5, 0.6)}))
    assert not any(column < 4 for _, column in table1(run).bold)


def test_curves_hold_every_seed_and_are_left_out_without_spools(whole, tmp_path):
    out, _, _ = whole
    curves = read_metrics(out / "official" / "spool")
    assert len(figures.series(curves, "fusion/jmt", "val/ccc_mean")) == 2
    assert figures.series(curves, "fusion/jmt", "train/lr")[0][0] == (0, 1e-3)
    assert figures.series(curves, "fusion", "train/loss") == []
    assert figures.learning_curves(read_run(make_light(tmp_path / "run", {}))) is None
    steps, _ = figures.thin([(i, 0.0) for i in range(10_001)])
    assert len(steps) <= figures.MOST_POINTS + 1 and steps[-1] == 10_000 and steps[0] == 0
