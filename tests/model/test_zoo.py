"""What every fusion model promises: shapes, gradients, no influence of neighbours or masked clips; JCA against NumPy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from jmt_dist.config import FUSION_MODELS, FusionOptions, JmtOptions
from jmt_dist.model.attention import Attention
from jmt_dist.model.cross import CrossAttentions
from jmt_dist.model.fusion import JMT
from jmt_dist.model.saturation import watch_saturation
from jmt_dist.model.zoo import make_fusion
from jmt_dist.model.zoo_recurrent import run_recurrent
from jmt_dist.model.zoo_temporal import TemporalNetwork
from tests.model import reference

REFERENCE = JmtOptions(score="softmax", rows="query", scale="sqrt", cross="shared", head="self_attention", normalise=True)


def build(name: str) -> nn.Module:
    """A model whose biases and norms are not 0 and 1, as after some training: zeros would hide a missing mask."""
    torch.manual_seed(11)
    options = FusionOptions(jmt=REFERENCE) if name == "jmt-reference" else FusionOptions(model=name)  # type: ignore[arg-type]
    model = make_fusion(options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias" in key:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def inputs(batch: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 8, 512, generator=generator).to(dtype), torch.randn(batch, 8, 512, generator=generator).relu().to(dtype)


every = pytest.mark.parametrize("name", [*FUSION_MODELS, "jmt-reference"])


@every
def test_shapes_and_gradients(name: str) -> None:
    model = build(name)
    audio, visual = inputs()
    audio.requires_grad_()
    visual.requires_grad_()
    y = model(audio, visual)
    assert y.shape == (4, 8, 2) and y.isfinite().all()
    y.square().sum().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert (audio.grad is None) == (name == "visual") and (visual.grad is None) == (name == "audio")
    with torch.no_grad():
        assert (y[..., 0] - y[..., 1]).abs().max() > 1e-4  # two targets, not one twice


@every
def test_batch_neighbours_have_no_influence(name: str) -> None:
    model = build(name).double().eval()
    audio, visual = inputs(dtype=torch.float64)
    mask = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) > 0.3
    with torch.no_grad():
        together, masked = model(audio, visual), model(audio, visual, mask)
        alone = torch.cat([model(audio[i : i + 1], visual[i : i + 1]) for i in range(4)])
        masked_alone = torch.cat([model(audio[i : i + 1], visual[i : i + 1], mask[i : i + 1]) for i in range(4)])
        audio[1:], visual[1:] = float("nan"), float("nan")
        poisoned = model(audio, visual)
    assert torch.allclose(together, alone, atol=1e-12) and torch.allclose(masked, masked_alone, atol=1e-12)
    assert torch.allclose(poisoned[0], together[0], atol=1e-12)


@every
def test_masked_clips_have_no_influence(name: str) -> None:
    model = build(name).double().eval()
    audio, visual = inputs(dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1, 1], [1] * 8, [0] * 8]).bool()
    with torch.no_grad():
        before = model(audio, visual, mask)
        audio[~mask], visual[~mask] = float("nan"), 1e6
        after = model(audio, visual, mask)
        whole = model(*inputs(dtype=torch.float64), torch.ones(4, 8, dtype=torch.bool))
        plain = model(*inputs(dtype=torch.float64))
    assert torch.equal(before[mask], after[mask])
    assert before.isfinite().all()
    assert torch.allclose(whole, plain, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in (*FUSION_MODELS, "jmt-reference") if n != "jca"])  # jca's length is fixed
def test_masked_clips_at_the_ends_equal_a_shorter_subsequence(name: str) -> None:
    model = build(name).double().eval()
    audio, visual = inputs(2, torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]]).bool().expand(2, 8)
    with torch.no_grad():
        found = model(audio, visual, mask)[:, 2:7]
        assert torch.allclose(found, model(audio[:, 2:7], visual[:, 2:7]), atol=1e-12)


@pytest.mark.parametrize("name", [n for n in (*FUSION_MODELS, "jmt-reference") if n not in ("concat", "gated")])
def test_clips_see_the_others(name: str) -> None:
    model = build(name).double().eval()
    audio, visual = inputs(1, torch.float64)
    with torch.no_grad():
        before = model(audio, visual)
        audio[0, 2] += 1
        visual[0, 2] += 1
        change = (model(audio, visual) - before).abs().amax(-1)[0]
    assert change[3:].min() > 1e-6


@pytest.mark.parametrize("name", ["lfan", "lstm"])
def test_causal_models_do_not_look_ahead(name: str) -> None:
    model = build(name).double().eval()
    audio, visual = inputs(1, torch.float64)
    with torch.no_grad():
        before = model(audio, visual)
        audio[0, 5:] = visual[0, 5:] = 0
        assert torch.equal(model(audio, visual)[0, :5], before[0, :5])


@pytest.mark.parametrize("name", ["audio", "visual"])
def test_one_modality_never_reads_the_other(name: str) -> None:
    model = build(name).eval()
    audio, visual = inputs()
    nothing = torch.full_like(audio, float("nan"))
    with torch.no_grad():
        wanted = model(audio, visual)
        found = model(audio, nothing) if name == "audio" else model(nothing, visual)
    assert torch.equal(found, wanted)


@every
def test_stored_features_are_half_precision(name: str) -> None:
    model = build(name).eval()
    audio, visual = (x.half() for x in inputs())
    with torch.no_grad():
        assert torch.equal(model(audio, visual), model(audio.float(), visual.float()))


def test_jca_equals_numpy() -> None:
    model = build("jca").double().eval()
    audio, visual = inputs(2, torch.float64)
    parameters = {key: value.numpy() for key, value in model.state_dict().items()}
    with torch.no_grad():
        found = model(audio, visual).numpy()
    for i in range(2):
        assert np.abs(found[i] - reference.jca(parameters, audio[i].numpy(), visual[i].numpy())).max() < 1e-9


@pytest.mark.parametrize("name", ["audio", "visual", "concat", "lstm", "selfattn_lstm", "tcn"])
def test_the_others_equal_numpy(name: str) -> None:
    model = build(name).double().eval()
    audio, visual = inputs(1, torch.float64)
    parameters = {key: value.numpy() for key, value in model.state_dict().items()}
    with torch.no_grad():
        found = model(audio, visual)[0].numpy()
    assert np.abs(found - reference.others(parameters, name, audio[0].numpy(), visual[0].numpy())).max() < 1e-9


@pytest.mark.parametrize("name", FUSION_MODELS)
def test_every_system_says_where_it_comes_from_and_what_that_leaves_open(name: str) -> None:
    said = type(make_fusion(FusionOptions(), name)).__doc__ or ""
    assert re.search(r"(19|20)\d\d|[Pp]aper|[Ss]ource", said), "no source"
    assert re.search(r"open|no such row|nowhere|here the|this takes|only as", said), "nothing on what it leaves open"
    assert re.search(r"=|softmax|equation|encoder \(", said), "no equation"


def test_jca_says_that_its_length_is_fixed() -> None:
    with pytest.raises(ValueError, match="needs 8 clips, not 6"):
        build("jca")(torch.zeros(1, 6, 512), torch.zeros(1, 6, 512))


def test_recurrent_mask_equals_the_valid_clips_alone() -> None:
    torch.manual_seed(0)
    network = nn.LSTM(6, 5, num_layers=2, batch_first=True).double()
    x = torch.randn(2, 8, 6).double()
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [1] * 8]).bool()
    with torch.no_grad():
        found = run_recurrent(network, x, mask)
        for i in range(2):
            assert torch.allclose(found[i][mask[i]], network(x[i : i + 1, mask[i]])[0][0], atol=1e-12)


def test_temporal_network_covers_the_subsequence_with_every_tap() -> None:
    network = TemporalNetwork(512, 256).double()
    x = torch.randn(1, 8, 512).double().requires_grad_()
    network(x)[0, -1].sum().backward()
    assert x.grad is not None and (x.grad.abs().sum(-1)[0] > 0).all()
    assert all(p.grad is not None and (p.grad.abs().sum((0, 1)) > 0).all() for p in network.parameters() if p.ndim == 3)


def test_lfan_attends_over_the_two_modalities_of_a_clip() -> None:
    """Equation of the class docstring, from its own streams, for one clip in NumPy."""
    model = build("lfan").double().eval()
    audio, visual = inputs(1, torch.float64)
    p = {key: value.numpy() for key, value in model.state_dict().items()}
    with torch.no_grad():
        streams = [model.visual(visual)[0, 3].numpy(), model.audio(audio)[0, 3].numpy()]
        found = model(audio, visual)[0, 3].numpy()
    q, k, v = (np.stack([reference.linear(p, f"{part}.{i}", s) for i, s in enumerate(streams)]) for part in ("query", "key", "value"))
    weights = np.exp(q @ k.T / np.sqrt(128))
    attended = weights / weights.sum(-1, keepdims=True) @ v
    joined = np.concatenate((streams[0], attended.reshape(-1)))
    wanted = reference.targets(p, "head.targets", reference.relu(reference.linear(p, "head.joint.0", joined)))
    assert np.abs(found - wanted).max() < 1e-9


def test_lfans_saturation_is_that_of_its_valid_clips() -> None:
    """Weights of both modalities in NumPy, from the model's own streams, sharpened so that some are saturated and some are not."""
    model = build("lfan").double().eval()
    with torch.no_grad():
        for layer in model.query:
            layer.weight *= 8
    audio, visual = inputs(2, torch.float64)
    mask = torch.tensor([[True] * 8, [True, False, True, True, False, True, True, False]])
    p = {key: value.numpy() for key, value in model.state_dict().items()}
    for given in (None, mask):
        with watch_saturation(model) as found, torch.no_grad():
            y = model(audio, visual, given)
            zeroed = (audio, visual) if given is None else (audio * mask[..., None], visual * mask[..., None])
            streams = [model.visual(zeroed[1], given).numpy(), model.audio(zeroed[0], given).numpy()]
        assert torch.equal(model(audio, visual, given), y) and model.observer is None
        q, k = (np.stack([reference.linear(p, f"{part}.{i}", s) for i, s in enumerate(streams)], 2) for part in ("query", "key"))
        scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(128))
        weights = (scores / scores.sum(-1, keepdims=True))[mask.numpy() if given is not None else np.ones((2, 8), bool)]
        wanted = np.mean((weights < 0.05) | (weights > 0.95))
        assert found.share == pytest.approx(wanted) and 0.05 < wanted < 0.95


def test_gated_is_the_gated_multimodal_unit() -> None:
    model = build("gated").double().eval()
    audio, visual = inputs(1, torch.float64)
    p = {key: value.numpy() for key, value in model.state_dict().items()}
    a, v = audio[0].numpy(), visual[0].numpy()
    z = 1 / (1 + np.exp(-reference.linear(p, "gate", np.concatenate((a, v), -1))))
    h = z * np.tanh(reference.linear(p, "visual", v)) + (1 - z) * np.tanh(reference.linear(p, "audio", a))
    wanted = reference.targets(p, "head.targets", reference.relu(reference.linear(p, "head.joint.0", h)))
    with torch.no_grad():
        assert np.abs(model(audio, visual)[0].numpy() - wanted).max() < 1e-9


def test_names_and_options() -> None:
    model = make_fusion(FusionOptions(jmt=JmtOptions(cross="shared")))
    assert isinstance(model, JMT) and model.options.cross == "shared"
    assert isinstance(make_fusion(FusionOptions(), "vanilla"), JMT)
    assert type(make_fusion(FusionOptions(), "tcn")) is type(build("tcn"))
    vanilla = build("vanilla")
    assert {m.style.score for m in vanilla.modules() if isinstance(m, Attention | CrossAttentions)} == {"softmax"}
