import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from jmt_dist.config import Recipe
from jmt_dist.errors import UsageError, UserError
from jmt_dist.evaluate.ensemble import combine
from jmt_dist.evaluate.estimator import run_source
from jmt_dist.evaluate.metric import scores
from jmt_dist.evaluate.predict import UnitPrediction, read_predictions, write_predictions
from jmt_dist.evaluate.smooth import smooth
from jmt_dist.model.zoo import make_fusion
from jmt_dist.recipe import build, dump, word_layer
from jmt_dist.track.facts import record_start
from jmt_dist.track.spool import Spool

LAUNCH = Path(__file__).parents[2] / "launch"
ROWS = {"134": 30, "video2_left": 20}


def main_of(name):
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where pydantic looks the annotations up
    spec.loader.exec_module(module)
    return module.main


def make_recipe(out, *words):
    out.mkdir(parents=True)
    recipe = build(Recipe, [word_layer(word) for word in words])
    dump(recipe, out / "recipe.yaml")
    return recipe


@pytest.fixture
def run(tmp_path):
    """A run folder with test predictions of two folds and two seeds, and validation predictions of one fold."""
    out, rng = tmp_path / "run", np.random.default_rng(0)
    make_recipe(out, "fusion.seeds=[0,1]")
    va = {}
    for fold in ("official", "fold-1"):
        for seed in (0, 1, 7):  # seed 7 is of earlier work: not in the recipe
            va[fold, seed] = {unit: rng.uniform(-1, 1, (rows, 2)).astype(np.float32) for unit, rows in ROWS.items()}
            folder = out / fold / "evaluate" / f"jmt-seed{seed}"
            write_predictions(folder / "test.parquet", va[fold, seed], {})
            if fold == "official":
                labels = {unit: np.clip(values + 0.2, -1, 1) for unit, values in va[fold, 0].items()}
                write_predictions(folder / "predictions.parquet", va[fold, seed], labels)
    return out, va


def test_test_units_are_the_mean_of_folds_and_seeds(run, tmp_path, capsys):
    out, va = run
    sample = tmp_path / "sample.txt"
    rows = [f"{unit}/{i:05d}.jpg" for unit in reversed(ROWS) for i in range(1, ROWS[unit] + 1)]
    sample.write_text("\n".join(["image_location,valence,arousal", *(f"{row},-5,-5" for row in rows)]) + "\n")
    words = [f"out={out}", f"to={tmp_path}/new/test.parquet", f"sample={sample}", f"challenge={tmp_path}/new/test.txt"]
    assert main_of("predict_units")([*words, "smooth_arousal=5", "decimals=4"]) == 0
    got = read_predictions(tmp_path / "new" / "test.parquet")
    for unit in ROWS:
        mean = np.mean([va[fold, seed][unit] for fold in ("official", "fold-1") for seed in (0, 1)], axis=0)
        np.testing.assert_allclose(got[unit].va, smooth(mean, 1, 5), atol=1e-6)
        assert np.isnan(got[unit].labels).all()
    lines = (tmp_path / "new" / "test.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == rows
    assert [float(v) for v in lines[1].split(",")[1:]] == pytest.approx(got["video2_left"].va[0].tolist(), abs=5.1e-5)
    printed = capsys.readouterr().out
    assert "combining 4 predictions (mean)" in printed and "seed7" not in printed and "no labels" in printed
    assert "50 rows of 2 units, 0 numbers clipped; checked" in printed and printed.rstrip().endswith("test.txt")


def test_validation_units_of_one_fold_are_scored(run, tmp_path, capsys):
    out, va = run
    assert main_of("predict_units")([f"out={out}", "split=validation", f"to={tmp_path}/v.parquet"]) == 0
    mean = np.concatenate([(va["official", 0][unit] + va["official", 1][unit]) / 2 for unit in ROWS])
    labels = np.concatenate([np.clip(va["official", 0][unit] + 0.2, -1, 1) for unit in ROWS])
    assert f"50 with labels: CCC valence {scores(mean, labels).valence:.3f}" in capsys.readouterr().out


def test_the_challenge_file_of_two_recipes_centred_and_smoothed_as_chosen(run, tmp_path, capsys, monkeypatch):
    out, va = run
    other = tmp_path / "other"
    make_recipe(other, "name=other", "fusion.seeds=[0]")
    rng = np.random.default_rng(9)
    for fold in ("official", "fold-1"):
        test = {unit: rng.uniform(-1, 1, (rows, 2)).astype(np.float32) for unit, rows in ROWS.items()}
        write_predictions(other / fold / "evaluate" / "jmt-seed0" / "test.parquet", test, {})
        va[fold, "other"] = test
    slow = {"v1": np.sin(np.arange(300)[:, None] / 60 + np.array([0, 1])).astype(np.float32) * 0.5}
    noisy = {"v1": slow["v1"] + rng.normal(0, 0.3, (300, 2)).astype(np.float32)}
    sample = tmp_path / "sample.txt"
    sample.write_text("image_location\n" + "".join(f"134/{i:05d}.jpg\n" for i in range(1, 31)))
    monkeypatch.chdir(tmp_path)
    words = [f"out={out}", "split=test", f"sample={sample}", f"also=[{other}]", "combine=centred", "smooth=chosen", "folds=[fold-1]"]
    assert main_of("predict_units")([*words, "per_unit=units"]) == 3  # no fold has validation predictions of both: nothing to choose on
    assert "missing: smoothing" in capsys.readouterr().out
    for folder in (out, other):
        for seed in (0, 1):
            write_predictions(folder / "fold-1" / "evaluate" / f"jmt-seed{seed}" / "predictions.parquet", noisy, slow)
    (tmp_path / "units").rename(tmp_path / "raw")
    assert main_of("predict_units")([*words, "per_unit=units"]) == 0
    printed = capsys.readouterr().out
    assert "chosen on 1 videos that fold-1 held out" in printed and "units video2_left" in printed
    runs = [
        {unit: UnitPrediction(va["fold-1", seed][unit], np.full((rows, 2), np.nan)) for unit, rows in ROWS.items()}
        for seed in (0, 1, "other")
    ]
    expected = combine(runs, "centred")["134"].va
    np.testing.assert_allclose(np.loadtxt(tmp_path / "raw" / "134.txt", delimiter=",", skiprows=1), expected, atol=1e-5)
    smoothed = np.loadtxt(tmp_path / "units" / "134.txt", delimiter=",", skiprows=1)
    assert smoothed.std() < 0.6 * expected.std()
    lines = (tmp_path / "challenge.txt").read_text().splitlines()
    assert len(lines) == 31 and printed.splitlines()[-1] == "challenge.txt"
    np.testing.assert_allclose([[float(v) for v in line.split(",")[1:]] for line in lines[1:]], smoothed, atol=2e-6)


def test_predict_refuses_in_one_line(run, tmp_path):
    out, _ = run
    main, to = main_of("predict_units"), f"to={tmp_path}/x.parquet"
    for words, message in [
        (["challenge=x.txt"], "`challenge` needs `sample`"),
        (["media=x.mp4"], "`media` goes with `crops`"),
        (["crops=x", "smooth=chosen"], "`crops` is new material"),
        (["crops=x", "folds=[official,fold-1]"], "the networks of one fold"),
        (["smooth=chosen", "smooth_arousal=9"], "`smooth=chosen` chooses the windows"),
    ]:
        with pytest.raises(UsageError, match=message):
            main([f"out={out}", to, *words])
    with pytest.raises(UsageError, match="validation units of several folds"):
        main([f"out={out}", to, "split=validation", "folds=[official,fold-1]"])
    with pytest.raises(UserError, match=r"fold fold-2 .* has no test predictions of jmt\. .*evaluate\.test=true"):
        main([f"out={out}", to, "folds=[official,fold-2]"])
    with pytest.raises(UserError, match="no test predictions of gated"):
        main([f"out={out}", to, "model=gated"])
    with pytest.raises(UserError, match="there is no run folder"):
        main([f"out={tmp_path}/gone", to])
    assert not (tmp_path / "x.parquet").exists()
    (tmp_path / "s.txt").write_text("image_location,valence,arousal\n134/00031.jpg,-5,-5\n")
    with pytest.raises(UserError, match="unit 134 has 30 predicted rows"):  # mended, the same command has to work
        main([f"out={out}", to, f"sample={tmp_path}/s.txt", f"challenge={tmp_path}/c.txt", f"per_unit={tmp_path}/units"])
    assert not (tmp_path / "units").exists() and not (tmp_path / "c.txt").exists()


def test_export_of_a_folds_best_weights(tmp_path, capsys):
    out = tmp_path / "run"
    recipe = make_recipe(out, "fusion.model=audio", "fusion.seeds=[4,5]")
    torch.manual_seed(0)
    model = make_fusion(recipe.fusion)
    folder = out / "fold-1" / "fusion" / "audio-seed4"
    folder.mkdir(parents=True)
    save_file(model.state_dict(), str(folder / "best.safetensors"))
    main = main_of("export_model")
    assert main([f"out={out}", "fold=fold-1", f"to={tmp_path}/audio.onnx"]) == 0
    printed = capsys.readouterr().out
    assert "largest difference from the model" in printed and printed.rstrip().endswith("audio.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "audio.onnx"), providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    assert (notes["fold"], notes["model"], notes["seed"]) == ("fold-1", "audio", "4")
    audio, visual = torch.randn(3, 8, 512), torch.randn(3, 8, 512)  # the file takes both, although this model reads one
    got = session.run(None, {"audio": audio.numpy(), "visual": visual.numpy()})[0]
    np.testing.assert_allclose(got, model.eval()(audio, visual).detach().numpy(), atol=1e-5)  # the weights, not fresh ones
    with pytest.raises(UserError, match=r"there are no weights at .*audio-seed5"):
        main([f"out={out}", "fold=fold-1", "seed=5", f"to={tmp_path}/x.onnx"])
    with pytest.raises(UsageError, match=r"there is no fusion model `gatd`\. Did you mean `gated`\?"):
        main([f"out={out}", "model=gatd", f"to={tmp_path}/x.onnx"])


def test_weights_of_another_recipe_are_not_taken_for_this_ones(tmp_path):
    """Of another scale they have the same shapes; what does not shape a model may differ."""
    out = tmp_path / "run"
    make_recipe(out, "fusion.jmt.scale=sqrt", "fusion.optimizer.lr=1e-5")
    spool = Spool(out / "official" / "spool")
    record_start(spool, out, build(Recipe, [word_layer("fusion.jmt.scale=none")]).model_dump(mode="json"), {})
    again = build(Recipe, [word_layer("fusion.jmt.scale=sqrt"), word_layer("stages=[visual]")])
    record_start(spool, out, again.model_dump(mode="json"), {})  # which trained no fusion
    spool.close()
    with pytest.raises(UserError, match=r"official .* trained with fusion\.jmt\.scale=none, .* says sqrt"):
        run_source(out)
    assert run_source(out, model="gated").model == "gated" and run_source(out, "fold-1").fold == "fold-1"
    make_recipe(tmp_path / "now", "fusion.optimizer.lr=1e-5")
    shutil.copytree(out / "official", tmp_path / "now" / "official")
    assert run_source(tmp_path / "now").recipe.fusion.optimizer.lr == 1e-5


@pytest.mark.parametrize("name", ["predict_units", "export_model", "compare_runs", "sync_tracking"])
def test_help_answers_at_once(name):
    command = [sys.executable, "-X", "importtime", str(LAUNCH / f"{name}.py"), "--help"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Options:" in done.stdout and "key=value" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "mlflow", "numpy", "rich", "matplotlib", "pyarrow"}  # what would make it slow, whatever the machine
    assert time.monotonic() - started < 10
