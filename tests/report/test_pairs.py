"""Rankings and their significance, by paths and from a store alone."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import false_discovery_control

from jmt_dist.config import Recipe
from jmt_dist.errors import UserError
from jmt_dist.evaluate.metric import ccc
from jmt_dist.evaluate.predict import write_predictions
from jmt_dist.recipe import build, dump, word_layer
from jmt_dist.report.pairs import Rank, adjust, common_fold, rank_runs, ranking_csv, ranking_table, reference_of
from jmt_dist.report.select import paths, stored
from jmt_dist.report.tables import Table, latex
from jmt_dist.report.write import compare_runs, show
from jmt_dist.track.compare import Score, read_run
from jmt_dist.track.tracker import ParentRun, create_child

ROOT = Path(__file__).parents[2]
VIDEOS = 14


def make(out, name, noise, fold="official", seeds=2, truth_seed=0, model="jmt"):
    """A run whose predictions are the labels, half as large, and noise of its own."""
    out.mkdir(parents=True, exist_ok=True)
    dump(build(Recipe, [word_layer(f"name={name}"), word_layer(f"fusion.seeds={list(range(seeds))}")]), out / "recipe.yaml")
    labels = np.random.default_rng(truth_seed)
    truth = {f"v{i}": (labels.uniform(-0.5, 0.5, 2) + 0.2 * labels.normal(size=(80, 2))).astype(np.float32) for i in range(VIDEOS)}
    truth["v3_left"] = truth.pop("v3")  # a unit's video has another name
    each = []
    for seed in range(seeds):
        draw = np.random.default_rng([len(name), int(noise * 1000), seed])
        va = {u: (0.8 * t + draw.normal(0, noise, t.shape)).astype(np.float32) for u, t in truth.items()}
        write_predictions(out / fold / "evaluate" / f"{model}-seed{seed}" / "predictions.parquet", va, truth)
        joined = np.concatenate([va[u] for u in truth]), np.concatenate(list(truth.values()))
        each.append([ccc(joined[0][:, k], joined[1][:, k]) for k in range(2)])
    v, a = np.mean(each, axis=0)
    scores = {"valence": v, "arousal": a, "average": (v + a) / 2}
    metrics = {"model": model, **scores, "interval": {k: (x - 0.1, x + 0.1) for k, x in scores.items()}, "baselines": {}}
    (out / fold / "metrics.json").write_text(json.dumps(metrics))
    return out


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    base = tmp_path_factory.mktemp("pairs") / "sweep"
    for name, noise in (("good", 0.2), ("twin", 0.201), ("bad", 0.5), ("worse", 0.7)):
        make(base / name, name, noise)
    return base


def test_the_ranking_tells_apart_what_differs_and_nothing_else(sweep):
    runs = paths([sweep])
    ranks = rank_runs(runs, common_fold(runs), 2000)
    assert [rank.name for rank in ranks][2:] == ["bad", "worse"] and {ranks[0].name, ranks[1].name} == {"good", "twin"}
    assert (
        ranks[0].distance is None
        and ranks[0].reference
        and ranks[1].adjusted > 0.05
        and ranks[2].adjusted < 0.05
        and ranks[3].adjusted < 0.05
    )
    for rank in ranks[1:]:
        assert rank.distance.value["average"] == pytest.approx(rank.score.average - ranks[0].score.average, abs=1e-9)
    table = ranking_table(ranks, "official")
    assert [row[7] for row in table.rows] == ["best", "not told apart", "behind", "behind"]
    assert table.bold == {(0, 4), (1, 4)} and table.rows[3][5].startswith("−0.")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Three fusion models; `gated` is the best, `jmt` in the middle; folders as a sweep names them."""
    base = tmp_path_factory.mktemp("zoo") / "zoo"
    for model, noise in (("jmt", 0.30), ("gated", 0.2), ("lstm", 0.2995)):
        make(base / model, f"demo-{model}", noise, model=model)
        costs = {model: {"parameters": 1_000_000 + len(model), "ms_per_1000_clips": 81.64}}
        (base / model / "official" / "costs.json").write_text(json.dumps(costs))
    return base


def resampled(runs, rounds):
    """[rounds, runs] average CCC of each run on the same resamples of videos: frames counted as often as their video is drawn,
    moments by np.average over frames, in another order of draws than ours."""
    tables = [[pq.read_table(file).to_pandas() for file in run.predictions("official", run.model)] for run in runs]
    video = tables[0][0].unit.str.split("_").str[0]
    videos = sorted(set(video))
    draw = np.random.default_rng(12345).integers(0, len(videos), (rounds, len(videos)))
    times = np.stack([(draw == k).sum(axis=1) for k in range(len(videos))], axis=1)
    weight = times[:, video.map({name: k for k, name in enumerate(videos)})].astype(np.float64)
    weight /= weight.sum(axis=1, keepdims=True)

    def score(x, y):
        x, y = x.to_numpy(np.float64), y.to_numpy(np.float64)
        mx, my = weight @ x, weight @ y
        vx, vy = (weight * (x - mx[:, None]) ** 2).sum(axis=1), (weight * (y - my[:, None]) ** 2).sum(axis=1)
        cov = (weight * (x - mx[:, None]) * (y - my[:, None])).sum(axis=1)
        return 2 * cov / (vx + vy + (mx - my) ** 2)

    targets = [(target, f"{target}_label") for target in ("valence", "arousal")]
    return np.stack([np.mean([score(t[p], t[y]) for t in seeds for p, y in targets], axis=0) for seeds in tables], axis=1)


def test_every_run_against_jmt_as_an_independent_bootstrap_has_it(zoo):
    runs = paths([zoo])
    ranks = rank_runs(runs, "official", 2000, reference_of(runs))
    assert [(rank.name, rank.reference) for rank in ranks] == [("demo-gated", False), ("demo-jmt", True), ("demo-lstm", False)]
    drawn = dict(zip([run.name for run in runs], resampled(runs, 2000).T, strict=True))
    tails = {}
    for rank in (ranks[0], ranks[2]):
        difference = drawn[rank.name] - drawn["demo-jmt"]
        low, high = np.percentile(difference, (2.5, 97.5))
        width = high - low
        assert rank.distance.interval["average"] == pytest.approx((low, high), abs=0.15 * width)  # 2,000 draws know it to 5 %
        tails[rank.name] = max(2 * min(np.mean(difference <= 0), np.mean(difference >= 0)), 2 / 2000)
        assert rank.p == pytest.approx(tails[rank.name], abs=0.05)
    assert ranks[0].p == 2 / 2000 and 0.05 < ranks[2].p < 1  # one is clear, of the other there is something to get wrong
    assert (ranks[0].adjusted, ranks[2].adjusted) == (2 * ranks[0].p, ranks[2].p)
    table = ranking_table(ranks, "official")
    assert table.columns[5:] == ("minus demo-jmt", "p", "verdict", "parameters", "ms per 1,000 clips")
    assert [row[7] for row in table.rows] == ["ahead", "reference", "not told apart"] and table.bold == {(0, 4)}
    assert table.rows[0][5].startswith("+0.") and table.rows[2][5].startswith("−0.") and table.rows[1][5] == ""
    average = ranks[1].score.average
    assert table.rows[1][4] == f"{average:.3f} [{average - 0.1:.3f}, {average + 0.1:.3f}]"
    assert [row[8:] for row in table.rows] == [("1,000,005", "82"), ("1,000,003", "82"), ("1,000,004", "82")]
    assert "Every run is compared with demo-jmt:" in table.note and "Holm's correction for 2 comparisons" in table.note
    lines = list(csv.DictReader(ranking_csv(ranks, "official").splitlines()))
    assert [line["reference"] for line in lines] == ["demo-jmt"] * 3 and lines[1]["difference"] == lines[1]["p"] == ""
    for line, rank in zip((lines[0], lines[2]), (ranks[0], ranks[2]), strict=True):
        assert float(line["difference"]) == pytest.approx(rank.score.average - ranks[1].score.average, abs=2e-6)
        assert (float(line["p"]), float(line["p_holm"])) == pytest.approx((rank.p, rank.adjusted), abs=1e-6)
        assert (line["verdict"], line["ms_per_1000_clips"]) == ("ahead" if rank is ranks[0] else "not told apart", "81.640")


def test_a_run_equal_to_the_reference_is_not_told_apart_from_it(zoo, tmp_path):
    shutil.copytree(zoo / "jmt", tmp_path / "copy")
    ranks = rank_runs([read_run(zoo / "jmt"), read_run(tmp_path / "copy")], "official", 500)
    assert [rank.p for rank in ranks] == [None, 1.0] and ranking_table(ranks, "official").rows[1][7] == "not told apart"


def test_which_run_the_others_are_compared_with(zoo, sweep):
    runs = paths([zoo])
    names = [run.name for run in runs]
    assert names[reference_of(runs)] == names[reference_of(runs, "jmt")] == names[reference_of(runs, "demo-jmt")] == "demo-jmt"
    assert names[reference_of(runs, "lstm")] == "demo-lstm" and reference_of(runs, "best") is None
    same = paths([sweep])  # all of them jmt
    assert reference_of(same) is None and reference_of([run for run in runs if run.model != "jmt"]) is None
    assert (runs + same)[reference_of(runs + same)].name == "demo-jmt"  # of several, the one whose name or folder says so
    assert reference_of(same + [run for run in runs if run.model != "jmt"]) is None
    for wanted, message in (("nothing", "names no run"), ("jmt", "names several runs")):
        with pytest.raises(UserError, match=f"reference={wanted} {message}"):
            reference_of(same, wanted)


def test_every_form_says_against_what(zoo, tmp_path, capsys):
    show(compare_runs(paths([zoo]), tmp_path / "jmt"))
    assert "Ranking on fold official, against demo-jmt" in capsys.readouterr().out
    compare_runs(paths([zoo]), tmp_path / "best", "best")
    for folder, words in (("jmt", ("minus demo-jmt", "ahead", "reference")), ("best", ("minus demo-gated", "behind", "best, demo-gated"))):
        for name in ("comparison.md", "comparison.tex", "report.html"):
            text = (tmp_path / folder / name).read_text()
            assert all(word in text for word in (*words, "1,000,003", "ms per 1,000 clips")), name
        rows = list(csv.DictReader((tmp_path / folder / "ranking.csv").read_text().splitlines()))
        assert {row["reference"] for row in rows} == {words[0].removeprefix("minus ")} and rows[1]["parameters"] == "1000003"
    with pytest.raises(UserError, match="reference=tcn names no run"):
        compare_runs(paths([zoo]), tmp_path / "none", "tcn")
    assert not (tmp_path / "none").exists()
    compare_runs(paths([zoo / "jmt"]), tmp_path / "best")
    assert not (tmp_path / "best" / "ranking.csv").exists()


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for place, noise in (("a/one", 0.2), ("a/two", 0.4), ("b/two", 0.6)):
        metrics = make(tmp_path / place, "paper", noise) / "official" / "metrics.json"
        metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "withheld": {"audio": {"average": 0.1}}}))
    make(tmp_path / "other", "other", 0.3)
    runs = paths([tmp_path / "a" / "one", tmp_path / "a" / "two", tmp_path / "b", tmp_path / "other"])
    names = ["paper: one", f"paper: {tmp_path}/a/two", f"paper: {tmp_path}/b/two", "other"]
    assert [run.name for run in runs] == names
    made = {table.title: [row[0] for row in table.rows] for table in compare_runs(runs, tmp_path / "both").tables}
    assert made["Runs compared"] == names and made["A missing modality, and attention, on fold official"] == names
    assert [run.name for run in paths([tmp_path / "a"])] == ["paper: one", "paper: two"]


def test_holm_is_holm():
    p = [0.04, 0.001, 0.03, None, 0.2]
    found = [rank.adjusted for rank in adjust([Rank(str(i), Score(0, 0, 0), None, value) for i, value in enumerate(p)])]
    assert found == [pytest.approx(0.09), pytest.approx(0.004), pytest.approx(0.09), None, pytest.approx(0.2)]
    known = [value for value in p if value is not None]
    lenient = false_discovery_control(known)  # Benjamini and Hochberg's are never larger
    assert all(strict >= loose - 1e-12 for strict, loose in zip([value for value in found if value is not None], lenient, strict=True))


def test_runs_on_other_labels_are_not_compared(sweep, tmp_path):
    other = make(tmp_path / "other", "other", 0.3, truth_seed=1)
    with pytest.raises(UserError, match="other and good were not scored on the same units and labels"):
        rank_runs([read_run(sweep / "good"), read_run(other)], "official", 100)
    assert common_fold([read_run(sweep / "good"), read_run(make(tmp_path / "elsewhere", "e", 0.3, fold="fold-1"))]) is None


def test_program_ranks_a_sweep_and_writes_every_form(sweep, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "compare_runs.py"), f"runs=[{sweep}]", f"out={tmp_path}/both"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "Ranking on fold official" in done.stdout and "missing" not in done.stdout
    assert {path.name for path in (tmp_path / "both").iterdir()} == {
        *("comparison.csv", "comparison.md", "comparison.tex"),
        *("ranking.csv", "report.html"),
    }
    tex = (tmp_path / "both" / "comparison.tex").read_text()
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == 2 and r"\textbf{0." in tex and "not told apart" in tex
    for words, message in [
        (["store=x", "runs=[a]"], "`store` and `runs` both say"),
        (["experiments=[a]"], "looked up in `store`"),
        (["runs=[a]", "frames=true"], "go with the folds of one run"),
        ([f"out={sweep}/good", "reference=best"], "`reference` goes with several runs"),
    ]:
        wrong = subprocess.run([sys.executable, str(ROOT / "launch" / "compare_runs.py"), "out=x", *words], capture_output=True, text=True)
        assert wrong.returncode == 2 and message in wrong.stderr and wrong.stderr.count("\n") == 1


def test_latex_escapes_and_sets_the_best_bold():
    table = Table("A_b & c", ("run", "x %"), (("a_1", "0.5 ± 0.1"), ("b#", "−0.2 → 1")), frozenset({(0, 1)}), "100 % {x}")
    assert latex(table, "tab:x").splitlines() == [
        r"\begin{table}",
        r"  \centering",
        r"  \caption{A\_b \& c. 100 \% \{x\}}",
        r"  \label{tab:x}",
        r"  \begin{tabular}{lr}",
        r"    \toprule",
        r"    run & x \% \\",
        r"    \midrule",
        r"    a\_1 & \textbf{0.5 $\pm$ 0.1} \\",
        r"    b\# & $-$0.2 $\to$ 1 \\",
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]


def test_a_store_alone_is_enough(sweep, store, tmp_path):
    """Runs by experiment and tag; of two the folders are gone, of one only numbers were logged."""
    client, parent = store
    ids = {}
    for name in ("good", "bad", "twin"):
        folder = tmp_path / name
        shutil.copytree(sweep / name, folder)
        experiment = client.create_run(
            parent.experiment_id, run_name=name, tags={"folder": str(folder), "site": "gpu" if name != "twin" else "cpu"}
        )
        own = ParentRun(parent.uri, parent.experiment_id, experiment.info.run_id)
        own.save(folder)
        child = create_child(own, "official")
        if name == "bad":
            for metric, value in (("val/ccc_valence", 0.1), ("val/ccc_arousal", 0.2), ("val/ccc_mean", 0.15)):
                client.log_metric(child, metric, value)
        elif name == "good":
            client.log_artifact(own.run_id, str(folder / "recipe.yaml"))
            client.log_artifact(child, str(folder / "official" / "metrics.json"))
            for seed in range(2):
                part = f"evaluate/jmt-seed{seed}"
                client.log_artifact(child, str(folder / "official" / part / "predictions.parquet"), part)
        if name != "twin":
            shutil.rmtree(folder)
        ids[name] = own.run_id
    scratch = tmp_path / "scratch"
    runs = stored(parent.uri, ["demo"], {"site": "gpu"}, scratch)
    assert [run.name for run in runs] == ["good", "bad"]
    assert runs[0].out == scratch / f"good-{ids['good'][:8]}" and runs[0].recipe["fusion.seeds"] == "[0, 1]"
    assert runs[1].folds[0].score.values() == (0.1, 0.2, 0.15) and runs[1].folds[1].reason == "not run"
    every = stored(parent.uri, [], {}, scratch)
    assert {run.name: str(run.out) for run in every}["twin"] == str(tmp_path / "twin")
    able = [run for run in every if run.name != "bad"]
    assert common_fold(able) == "official"
    here, there = rank_runs(able, "official", 500), rank_runs(paths([sweep / "good", sweep / "twin"]), "official", 500)
    assert here == there
    for words, message in [
        ((["nowhere"], {}), "there is no experiment `nowhere`.*There are: .*demo"),
        (([], {"site": "moon"}), "no run of .* is site=moon"),
    ]:
        with pytest.raises(UserError, match=message):
            stored(parent.uri, *words, scratch)
    for uri, message in (("http://127.0.0.1:1", "cannot be read"), (f"sqlite:///{tmp_path}/typo.db", "")):
        with pytest.raises(UserError, match=f"(the|no) tracking store {re.escape(uri)}.*{message}"):
            stored(uri, [], {}, scratch)
    assert not list(tmp_path.glob("typo*"))


def test_a_store_asked_again_says_how_things_are_now(sweep, store, tmp_path, capfd):
    """A fold at work, then with scores only, then with its files, then evaluated anew; unchanged predictions are not fetched twice."""
    client, parent = store
    run_id = client.create_run(parent.experiment_id, run_name="good", tags={"folder": "/gone", "asked": "again"}).info.run_id
    child = create_child(ParentRun(parent.uri, parent.experiment_id, run_id), "official")
    scratch, files = tmp_path / "scratch", sweep / "good"

    def now():
        [run] = stored(parent.uri, ["demo"], {"asked": "again"}, scratch)
        return run, run.folds[0]

    assert now()[1].reason == "running (no scores in MLflow)"
    for name, value in (("valence", 0.1), ("arousal", 0.2), ("mean", 0.15)):
        client.log_metric(child, f"val/ccc_{name}", value)
    run, fold = now()
    assert fold.score.values() == (0.1, 0.2, 0.15) and fold.score.interval is None and "fusion.seeds" not in run.recipe
    client.log_artifact(run_id, str(files / "recipe.yaml"))
    client.log_artifact(child, str(files / "official" / "metrics.json"))
    (tmp_path / "costs.json").write_text(json.dumps({"jmt": {"parameters": 7}}))
    client.log_artifact(child, str(tmp_path / "costs.json"))
    for seed in range(2):
        part = f"evaluate/jmt-seed{seed}"
        client.log_artifact(child, str(files / "official" / part / "predictions.parquet"), part)
    capfd.readouterr()
    run, fold = now()
    assert capfd.readouterr().err == "" and fold.costs == {"parameters": 7}
    assert fold.score == read_run(files).folds[0].score and run.recipe["fusion.seeds"] == "[0, 1]"
    seeds = run.predictions("official", "jmt")
    assert len(seeds) == 2
    written = seeds[0].stat().st_ctime_ns  # a copy may keep the time of change, not this one
    assert now()[0].predictions("official", "jmt")[0].stat().st_ctime_ns == written
    other = make(tmp_path / "other", "good", 0.4)
    client.log_artifact(child, str(other / "official" / "metrics.json"))
    changed = other / "official" / "evaluate" / "jmt-seed0" / "predictions.parquet"
    client.log_artifact(child, str(changed), "evaluate/jmt-seed0")
    assert now()[1].score == read_run(other).folds[0].score and seeds[0].read_bytes() == changed.read_bytes()
