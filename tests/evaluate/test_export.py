from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from jmt_dist.config import FusionOptions
from jmt_dist.errors import UserError
from jmt_dist.evaluate import export
from jmt_dist.evaluate.export import AUDIO, export_onnx, parity, visual_port
from jmt_dist.model.heads import AudioModel, VisualModel
from jmt_dist.model.zoo import make_fusion
from jmt_dist.recipe import load_recipe

PAPER = Path(__file__).parents[2] / "launch" / "recipes" / "paper.yaml"


@pytest.fixture(scope="module")
def jmt(tmp_path_factory):
    torch.manual_seed(3)
    model = make_fusion(FusionOptions())
    path = export_onnx(model, tmp_path_factory.mktemp("export") / "new" / "jmt.onnx", notes={"fold": "official", "seed": "0"})
    return model, path


def test_a_recurrent_model_gives_the_same_numbers(tmp_path):
    torch.manual_seed(1)
    model = make_fusion(FusionOptions(), "lstm")
    path = export_onnx(model, tmp_path / "lstm.onnx")
    assert parity(model, path) < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["lstm.onnx"]  # one file, no scratch, no weights beside it


def test_file_says_what_it_is_and_takes_any_batch(jmt):
    model, path = jmt
    proto = onnx.load(path)
    assert {p.key: p.value for p in proto.metadata_props} == {"fold": "official", "seed": "0"}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape[1:]) for i in session.get_inputs()] == [(n, "tensor(float)", [8, 512]) for n in ("audio", "visual")]
    rng = np.random.default_rng(0)
    audio, visual = (rng.normal(size=(33, 8, 512)).astype(np.float32) for _ in range(2))
    with torch.no_grad():
        expected = model(torch.from_numpy(audio), torch.from_numpy(visual)).numpy()
    together = session.run(["va"], {"audio": audio, "visual": visual})[0]
    np.testing.assert_allclose(together, expected, atol=2e-4)
    alone = session.run(["va"], {"audio": audio[:1], "visual": visual[:1]})[0]
    np.testing.assert_allclose(alone, together[:1], atol=2e-4)
    assert np.std(together) > 1e-3


def test_parity_notices_another_model(jmt):
    model, path = jmt
    assert parity(model, path) < 1e-4
    other = make_fusion(FusionOptions())
    with pytest.raises(UserError, match="differs from the model by"):
        parity(other, path)


def test_what_is_missing_is_said(jmt, tmp_path, monkeypatch):
    model, path = jmt
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name in ("onnxscript", "onnxruntime") else find(name))
    with pytest.raises(UserError, match="needs the package onnxscript"):
        export_onnx(model, tmp_path / "x.onnx")
    assert parity(model, path) is None


class Branching(torch.nn.Module):
    def forward(self, audio, visual):
        return audio[..., :2] if audio.sum() > 0 else visual[..., :2]


def test_a_model_that_cannot_be_exported_gives_one_line(tmp_path):
    with pytest.raises(UserError, match="Branching cannot be exported"):
        export_onnx(Branching(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_papers_backbones_give_the_same_numbers(tmp_path):
    """At the paper's geometry: R(2+1)D-18 on clips of 8 x 224 x 224, ResNet-18 and GRU on eight spectrograms of 64 x 107."""
    recipe = load_recipe(PAPER, ["visual.weights=none", "audio.weights=none"])
    torch.manual_seed(9)
    visual, audio = VisualModel(recipe.visual).backbone, AudioModel(recipe.audio).backbone
    with torch.no_grad():  # buffers of BatchNorm that have seen something
        visual.train()(torch.randn(2, 3, 8, 56, 56))
        audio.train()(torch.randn(2, 8, 64, 107))
    clips = visual_port(recipe.visual.size)
    assert clips.inputs == {"clips": (3, 8, 224, 224)}
    for net, port, shape in ((visual.eval(), clips, (2, 512)), (audio.eval(), AUDIO, (2, 8, 512))):
        ((name, size),) = port.inputs.items()
        path = export_onnx(net, tmp_path / f"{name}.onnx", port)
        value = torch.randn(2, *size)
        value[1] *= 3  # features of noise are nearly the same for all noise
        with torch.no_grad():
            expected = net(value).numpy()
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        got = session.run(["features"], {name: value.numpy()})[0]
        largest, difference = np.abs(expected).max(), np.abs(got - expected).max()
        assert got.shape == shape and np.abs(expected[1] - expected[0]).max() > 0.01 * largest
        assert difference < 1e-4 * min(1, largest), (difference, largest)
