"""Backbones and unimodal models at small sizes: shapes, gradients, pooling, GRU, neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from jmt_dist.config import AudioOptions, VisualOptions
from jmt_dist.errors import UserError
from jmt_dist.model.backbones import AudioBackbone, VisualBackbone
from jmt_dist.model.heads import AudioModel, Regressor, VisualModel
from jmt_dist.model.registry import audio_backbone, make_visual, visual_backbone
from jmt_dist.model.weights import load_initial


def visual(**changes: object) -> VisualOptions:
    return VisualOptions.model_validate({"depth": 10, "size": 32, "weights": "none", **changes})


def audio(**changes: object) -> AudioOptions:
    return AudioOptions.model_validate({"weights": "none", **changes})


def without_gradient(model: nn.Module) -> list[str]:
    return [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]


@pytest.mark.parametrize("depth", [10, 18])
def test_visual_model(depth: int) -> None:
    torch.manual_seed(0)
    model = VisualModel(visual(depth=depth, dropout=0.5))
    features, va = model(torch.randn(2, 2, 3, 8, 32, 32))
    assert features.shape == (2, 2, 512) and va.shape == (2, 2, 2)
    va.square().sum().backward()
    assert not without_gradient(model)


def test_depths_differ_by_one_block_per_layer() -> None:
    def convolutions(depth: int) -> int:
        net = VisualBackbone(visual(depth=depth)).net
        return sum(isinstance(m, nn.Conv3d) for name, m in net.named_modules() if "downsample" not in name)

    # depth counts the last FC and each (2+1)D convolution, which is two Conv3d
    assert convolutions(18) == 2 * (18 - 1) and convolutions(10) == 2 * (10 - 1)


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_pooling(pooling: str) -> None:
    backbone = VisualBackbone(visual(pooling=pooling)).eval()
    maps: list[torch.Tensor] = []
    backbone.net.layer4.register_forward_hook(lambda module, args, output: maps.append(output))
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 8, 64, 64))
    flat = maps[0].flatten(2)
    assert flat.shape[-1] == 16  # 8 frames, 64 × 64 → 1 × 4 × 4: there is something to pool
    assert torch.allclose(features, flat.amax(-1) if pooling == "max" else flat.mean(-1), atol=1e-6)


def test_visual_accepts_channels_last_views() -> None:
    model = VisualModel(visual()).eval()
    stored = torch.randn(2, 2, 8, 32, 32, 3)  # as the loader delivers: FHWC in memory
    frames = stored.permute(0, 1, 5, 2, 3, 4)
    with torch.no_grad():
        assert torch.allclose(model(frames)[0], model(frames.contiguous())[0], atol=1e-5)


@pytest.mark.parametrize("gru", [True, False])
def test_audio_model(gru: bool) -> None:
    torch.manual_seed(0)
    model = AudioModel(audio(gru=gru))
    features, va = model(torch.randn(2, 8, 64, 107))
    assert features.shape == (2, 8, 512) and va.shape == (2, 8, 2)
    va.square().sum().backward()
    assert not without_gradient(model)
    assert any("gru" in key for key, _ in model.named_parameters()) is gru


def test_gru_runs_forward_over_the_clips_of_one_subsequence() -> None:
    torch.manual_seed(0)
    backbone = AudioBackbone(audio()).eval()
    mel = torch.randn(2, 8, 64, 107)
    changed = mel.clone()
    changed[0, 4] += 1
    with torch.no_grad():
        before, after = backbone(mel), backbone(changed)
        difference = (after - before).abs().amax(-1)
    assert difference[0, :4].max() < 1e-6 and difference[0, 4:].min() > 1e-5 and difference[1].max() < 1e-6


def test_without_gru_clips_are_independent() -> None:
    backbone = AudioBackbone(audio(gru=False)).eval()
    mel = torch.randn(1, 8, 64, 107)
    with torch.no_grad():
        assert torch.allclose(backbone(mel)[:, 3], backbone(mel[:, 3:4])[:, 0], atol=1e-5)


def test_no_influence_of_batch_neighbours_in_evaluation() -> None:
    torch.manual_seed(0)
    for model, batch in (
        (VisualModel(visual(dropout=0.8)), torch.randn(3, 1, 3, 8, 24, 24)),
        (AudioModel(audio(dropout=0.8)), torch.randn(3, 2, 64, 107)),
    ):
        model = model.double()
        batch = batch.double()
        model(batch)  # running statistics away from their start
        model.eval()
        with torch.no_grad():
            together = model(batch)
            batch[1:] = float("nan")
            poisoned, alone = model(batch), model(batch[:1])
        for full, bad, single in zip(together, poisoned, alone, strict=True):
            assert torch.allclose(full[:1], single, atol=1e-10) and torch.allclose(bad[:1], single, atol=1e-10)


def test_regressor_drops_in_training_only() -> None:
    torch.manual_seed(0)
    head = Regressor(dropout=0.8)
    x = torch.randn(4, 8, 512)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x)) and head(x).shape == (4, 8, 2)
    assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [0.8, 0.8]


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_resnet50_pools_its_frames_and_sees_no_motion(pooling: str) -> None:
    torch.manual_seed(0)
    backbone = make_visual(visual(backbone="resnet50", pooling=pooling)).eval()
    frames = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        features = backbone(frames)
        assert features.shape == (2, 512)
        assert torch.allclose(backbone(frames.flip(2)), features, atol=1e-4)  # the order of the frames does not matter
        each = torch.stack([backbone.net(frames[:, :, t]) for t in range(8)])
        wanted = backbone.reduce(each.amax(0) if pooling == "max" else each.mean(0))
        assert torch.allclose(features, wanted, atol=1e-4)
        assert (backbone.net(frames[:, :, 0]) - backbone.net(frames[:, :, 1])).abs().max() > 1e-3


def test_resnet50_trains_every_parameter() -> None:
    torch.manual_seed(0)
    model = VisualModel(visual(backbone="resnet50", dropout=0.0))
    features, va = model(torch.randn(2, 2, 3, 8, 32, 32))
    assert features.shape == (2, 2, 512) and va.shape == (2, 2, 2)
    va.square().sum().backward()
    assert not without_gradient(model)


def test_a_backbone_of_ones_own_is_one_registered_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_faces.py").write_text(
        "import torch\n"
        "from jmt_dist.model.registry import audio_backbone, visual_backbone\n"
        "class Mean(torch.nn.Module):\n"
        "    def __init__(self, width):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(3, width)\n"
        "    def forward(self, frames):\n"
        "        return self.layer(frames.mean((2, 3, 4)))\n"
        "class Columns(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(64, 512)\n"
        "    def forward(self, mel):\n"
        "        return self.layer(mel.mean(-1))\n"
        "visual_backbone('mean')(lambda options: Mean(512))\n"
        "visual_backbone('narrow')(lambda options: Mean(100))\n"
        "audio_backbone('columns')(lambda options: Columns())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    frames = torch.randn(2, 4, 3, 8, 32, 32)
    model = VisualModel(visual(backbone="own_faces:mean"))
    features, va = model(frames)
    assert torch.allclose(features, model.backbone.layer(frames.mean((3, 4, 5))), atol=1e-6) and va.shape == (2, 4, 2)
    assert AudioModel(audio(backbone="own_faces:columns"))(torch.randn(2, 4, 64, 107))[0].shape == (2, 4, 512)
    torch.save({"layer.weight": torch.ones(512, 3), "layer.bias": torch.zeros(512)}, tmp_path / "own.pth")
    load_initial(model, visual(backbone="own_faces:mean", weights=str(tmp_path / "own.pth")))
    assert torch.equal(model.backbone.layer.weight, torch.ones(512, 3))
    with pytest.raises(UserError, match="features of 100, the fusion takes 512"):
        VisualModel(visual(backbone="own_faces:narrow"))(frames)


def test_backbones_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(UserError, match=r"no visual backbone resnet5\. Did you mean resnet50"):
        VisualModel(visual(backbone="resnet5"))
    with pytest.raises(UserError, match=r"no audio backbone zzz\. Known: "):
        AudioModel(audio(backbone="zzz"))
    with pytest.raises(UserError, match="nowhere cannot be imported"):
        VisualModel(visual(backbone="nowhere:mine"))
    with pytest.raises(ValueError, match="'resnet50' already"):
        visual_backbone("resnet50")(lambda options: nn.Identity())
    with pytest.raises(ValueError, match="'resnet18' already"):
        audio_backbone("resnet18")(lambda options: nn.Identity())
