"""A pipeline used without shards and loader gives what the stages give; its exported folder needs PyTorch alone."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from jmt_dist.config import FoldOptions, PackOptions, Recipe
from jmt_dist.data.pack import pack
from jmt_dist.data.pipeline import ClipLoader, clips
from jmt_dist.data.shards import fold_shards
from jmt_dist.errors import UsageError, UserError
from jmt_dist.evaluate.estimator import Estimator, load_estimator, run_source
from jmt_dist.evaluate.export import export_folder
from jmt_dist.evaluate.material import read_material
from jmt_dist.evaluate.predict import UnitRows, dense, read_predictions
from jmt_dist.model.heads import AudioModel, VisualModel
from jmt_dist.model.zoo import make_fusion
from jmt_dist.recipe import build, dump, word_layer
from tests.data.tree import jpeg, picture, sound, write_unit
from tests.evaluate.test_programs import main_of

ROWS = 70  # a segment's end within the unit's last samples: half of its clips lie past the end
WORDS = ("visual.depth=10", "visual.size=24", "visual.weights=none", "audio.weights=none", "fusion.seeds=[3]")
GONE = (1, 2, 30, 31, 70)  # frames without a face


def make_run(out):
    """A run folder with weights as training leaves them, random but not still: BatchNorm's buffers have seen something."""
    recipe = build(Recipe, [word_layer(word) for word in WORDS])
    out.mkdir(parents=True)
    dump(recipe, out / "recipe.yaml")
    torch.manual_seed(5)
    models = {"visual": VisualModel(recipe.visual), "audio": AudioModel(recipe.audio), "fusion/jmt-seed3": make_fusion(recipe.fusion)}
    with torch.no_grad():
        models["visual"].train()(torch.randn(2, 2, 3, 8, 24, 24))
        models["audio"].train()(torch.randn(2, 2, 64, 107))
        for layer in models["fusion/jmt-seed3"].modules():  # an untrained one says 8: all would be clipped to 1
            if isinstance(layer, torch.nn.Linear) and layer.out_features == 1:
                layer.weight *= 0.05
    for name, model in models.items():
        folder = out / "official" / name
        folder.mkdir(parents=True)
        save_file(model.eval().state_dict(), str(folder / "best.safetensors"))
    (out / "official" / "metrics.json").write_text(json.dumps({"valence": 0.5, "arousal": 0.4, "average": 0.45}))
    return recipe, models


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run folder, and a tree with one unit that lacks some faces."""
    base = tmp_path_factory.mktemp("estimator")
    recipe, models = make_run(base / "run")
    write_unit(base / "tree", "t1", ROWS, 1)
    for k in range(4):  # five videos are the fewest that can be divided into folds
        write_unit(base / "tree", f"u{k}", 8, 10 + k)
    write_unit(base / "tree", "v1", ROWS, 2, "Validation_Set", fps=25)
    # without chroma subsampling: with it, a strip's decoder smooths colours over the border of two frames, a crop's cannot
    for path in (base / "tree" / "cropped_aligned" / "v1").iterdir():
        path.write_bytes(jpeg(picture(2000 + int(path.stem) % 8), subsampling=0))
    for frame in GONE:
        (base / "tree" / "cropped_aligned" / "v1" / f"{frame:05d}.jpg").unlink()
    return base, recipe, models


def through_the_loader(base, recipe, models):
    """The unit's dense predictions by the shards, the DALI loader and the stages' own arithmetic."""
    pack(PackOptions(source=str(base / "tree"), out=str(base / "shards"), workers=1), say=lambda line: None)
    shards = fold_shards(base / "shards", FoldOptions(), "official", "validation")
    offsets = list(range(8))
    loader = ClipLoader(shards, data=recipe.data, batch=4, offsets=offsets, size=24)
    visual, audio, idents = [], [], []
    with torch.no_grad():
        for batch in loader.batches():
            visual.append(torch.stack([models["visual"](clips(batch["frames"], q))[0] for q in offsets], 1))
            audio.append(torch.stack([models["audio"](batch["mel"][:, q])[0] for q in offsets], 1))
            idents.append(batch["id"])
        ident = torch.cat(idents).numpy()
        flat = [torch.cat(parts).half().float().view(-1, 8, 512) for parts in (audio, visual)]  # stored in half precision
        va = models["fusion/jmt-seed3"](*flat).numpy().reshape(len(ident), 8, 8, 2)
    return dense(va, ident, offsets, [UnitRows(int(ident[0, 0]), "v1", ROWS)])["v1"]


@pytest.mark.slow
def test_crops_and_a_video_give_what_the_stages_give(place, tmp_path, monkeypatch, capsys):
    base, recipe, models = place
    expected = through_the_loader(base, recipe, models)
    monkeypatch.chdir(tmp_path)
    crops, video = base / "tree" / "cropped_aligned" / "v1", base / "tree" / "batch1" / "v1.avi"
    assert main_of("predict_units")([f"out={base}/run", f"crops={crops}", f"media={video}"]) == 0
    printed = capsys.readouterr().out
    assert "5 of 70 frames have no crop: black" in printed and printed.splitlines()[-1] == "predictions-v1.parquet"
    got = read_predictions(tmp_path / "predictions-v1.parquet")["v1"]
    assert got.va.shape == (ROWS, 2) and np.isfinite(got.va).all() and np.isnan(got.labels).all()
    spread = expected.std(axis=0)
    assert (spread > 1e-3).all()  # else agreement would say nothing
    assert np.abs(got.va - expected).max() < 0.02 * spread.min()
    # another video's sound, other crops: other numbers
    other = Estimator(run_source(base / "run")).to("cpu").predict(read_material(crops, base / "tree" / "batch1" / "t1.avi"))
    assert np.abs(other - expected).max() > 0.1 * spread.min()


@pytest.mark.slow
def test_an_exported_folder_needs_pytorch_alone(place, tmp_path):
    base, _, models = place
    folder, wav = tmp_path / "new" / "jmt", tmp_path / "v1.wav"
    soundfile.write(wav, sound(2, ROWS / 25), 44_100)
    assert main_of("export_model")([f"out={base}/run", f"to={folder}"]) == 0
    crops = base / "tree" / "cropped_aligned" / "v1"
    program = f"""
import sys
from pathlib import Path
from jmt_dist.evaluate.estimator import load_estimator
from jmt_dist.evaluate.material import read_material
import numpy as np
np.save("{tmp_path}/got.npy", load_estimator(Path("{folder}")).predict(read_material(Path("{crops}"), Path("{wav}"), 25.0)))
heavy = sorted({{name.split(".")[0] for name in sys.modules}} & {{"deepspeed", "nvidia", "mlflow", "webdataset", "submitit"}})
sys.exit(f"loaded {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # the crop of frame 70 is one of those missing: the sound alone gives no more than 69 rows
    whole = Estimator(run_source(base / "run")).to("cpu").predict(read_material(crops, wav, 25.0))
    assert len(whole) == 69
    np.testing.assert_allclose(np.load(tmp_path / "got.npy"), whole, atol=1e-4)  # sums in another order, where threads are more
    assert whole.std(axis=0).min() > 5e-3
    text = json.loads((folder / "model.json").read_text())
    assert text["pipeline"] == {"recipe": "paper", "fold": "official", "model": "jmt", "seed": 3, "size": 24}
    assert text["metrics"]["average"] == 0.45 and text["inputs"]["mel"]["n_fft"] == 1024 and "licence" in text
    assert set(text["files"]) == {p.name for p in folder.iterdir()} - {"model.json"} and len(text["files"]) == 7
    assert all(difference < 1e-4 for difference in text["onnx_differences"].values()) and len(text["onnx_differences"]) == 3
    agree_with_onnx(folder, models)
    for word in ("folds=[fold-1]", "model=gated", "seed=0"):
        with pytest.raises(UsageError, match=r"is jmt of fold official, seed 3"):
            main_of("predict_units")([f"out={folder}", f"crops={crops}", f"to={tmp_path}/no.parquet", word])
    damaged(folder)


def agree_with_onnx(folder, models):
    """ONNX Runtime's backbones against PyTorch's on one batch of another size than the exporter drew."""
    draw = torch.Generator().manual_seed(8)
    values = {
        "visual": ("clips", torch.randn(4, 3, 8, 24, 24, generator=draw)),
        "audio": ("mel", torch.randn(3, 8, 64, 107, generator=draw)),
    }
    for name, (port, value) in values.items():
        session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            expected = models[name].backbone.eval()(value).numpy()
        got = session.run(["features"], {port: value.numpy()})[0]
        assert got.std() > 1e-2
        np.testing.assert_allclose(got, expected, atol=1e-4 * max(1, np.abs(expected).max()))


def damaged(folder):
    weights = folder / "audio.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"audio.safetensors is damaged"):
        load_estimator(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"audio.safetensors is missing"):
        load_estimator(folder)
    weights.write_bytes(whole)
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text(text.replace('"hop": 441', '"hop": 440'))
    with pytest.raises(UserError, match="another version"):
        load_estimator(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_estimator(folder)


def test_a_recipe_of_middle_labels_predicts_their_frames(place, monkeypatch):
    """Every clip is said to be worth its end frame's number: with middle labels frame f gets that of the clip that ends at f + 12."""
    estimator = Estimator(run_source(place[0] / "run")).to("cpu")
    material = read_material(place[0] / "tree" / "cropped_aligned" / "v1", None)
    for label, later in (("end", 0), ("middle", 12)):
        phases = iter(range(4))  # of the only segment

        def end_frames(self, strip, mel, phases=phases):
            ends = 1 + next(phases) + 4 * (np.arange(8)[:, None] + 8 * np.arange(8))  # [q, j]
            return torch.tensor(np.repeat(ends[..., None] / 1000, 2, axis=2))

        monkeypatch.setattr(Estimator, "sample", end_frames)
        estimator.source = replace(estimator.source, recipe=estimator.source.recipe.model_copy(update={"label": label}))
        got = estimator.predict(material)
        np.testing.assert_allclose(1000 * got[:, 0], np.arange(1, len(got) + 1) + later, atol=1e-3)


def test_what_cannot_be_exported_or_loaded_is_said(place, tmp_path):
    base, _, _ = place
    with pytest.raises(UserError, match="neither a run folder nor an exported model"):
        load_estimator(tmp_path)
    with pytest.raises(UserError, match=r"there are no weights at .*fold-2"):
        load_estimator(base / "run", "fold-2")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        export_folder(run_source(base / "run"), tmp_path / "there")
    shutil.copytree(base / "run", tmp_path / "run")
    status = tmp_path / "run" / "official" / "status.json"
    for state in ("waiting", "running", "failed"):  # recipe.yaml is of the submission, the weights perhaps of the one before
        status.write_text(json.dumps({"state": state}))
        with pytest.raises(UserError, match=rf"official of .* is not done \({state}\): its weights may be of other settings"):
            run_source(tmp_path / "run")
    status.write_text(json.dumps({"state": "done"}))
    for part, weights in (("features", ""), ("visual", "two"), ("audio", "one")):
        (tmp_path / "run" / "official" / part).mkdir(exist_ok=True)
        (tmp_path / "run" / "official" / part / "done.json").write_text(json.dumps({"weights": weights}))
    made_by = tmp_path / "run" / "official" / "features" / "backbones.json"
    made_by.write_text(json.dumps({"visual": "one", "audio": "one"}))
    with pytest.raises(UserError, match="features was made by another training of the visual stage"):
        run_source(tmp_path / "run")
    made_by.write_text(json.dumps({"visual": "two", "audio": "one"}))
    assert run_source(tmp_path / "run").fold == "official"
    (tmp_path / "run" / "official" / "visual" / "best.safetensors").write_bytes(
        (tmp_path / "run" / "official" / "audio" / "best.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match="holds another model"):
        export_folder(run_source(tmp_path / "run"), tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


def test_material_says_what_is_missing(place, tmp_path):
    base, _, _ = place
    crops, video = base / "tree" / "cropped_aligned" / "v1", base / "tree" / "batch1" / "v1.avi"
    silent = read_material(crops, None, 20.0)
    assert silent.notes == ("no video: 20 frames per second", "no sound: silence", "4 of 69 frames have no crop: black")
    assert silent.rows == 69 and silent.times[1] == 0.05
    whole = read_material(crops, video)
    assert whole.rows == ROWS and whole.times[1] == pytest.approx(1 / 25) and len(whole.pcm) == pytest.approx(ROWS / 25 * 44_100, abs=2)
    for wrong, message in [
        ((tmp_path / "gone", None), "there is no folder"),
        ((tmp_path, None), "holds no crop"),
        ((crops, tmp_path / "gone.mp4"), "there is no file"),
        ((crops, Path(__file__)), "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            read_material(*wrong)
    for name in ("00073.jpg", "73.jpg"):
        (tmp_path / name).write_bytes((crops / "00003.jpg").read_bytes())
        with pytest.raises(UserError, match="a crop of frame 73, but .* has 70 frames" if name == "00073.jpg" else "are both frame 73"):
            read_material(tmp_path, video)
    (tmp_path / "73.jpg").unlink()
    (tmp_path / "00073.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"00073.jpg is not a picture"):
        next(iter(read_material(tmp_path, None).samples()))
