"""JMT in every preset against an independent NumPy forward pass, its size, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jmt_dist.config import JmtOptions
from jmt_dist.errors import UserError
from jmt_dist.model.attention import AttentionStyle
from jmt_dist.model.cross import CrossAttentions
from jmt_dist.model.fusion import JMT
from tests.model import reference

PRESETS = {
    "paper": JmtOptions(),
    "reference": JmtOptions(score="softmax", rows="query", scale="sqrt", cross="shared", head="self_attention", normalise=True),
    "demo": JmtOptions(scale="sqrt", bias="log_length"),
    "vanilla": JmtOptions(score="softmax", rows="query", scale="sqrt", joint=False),
    "mixed": JmtOptions(score="softmax", rows="key", scale="sqrt", heads=4, layers=2, feedforward=96, head="self_attention", joint=False),
}


def arrays(model: JMT) -> reference.Parameters:
    """The model's parameters, those of each cross-attention under `cross.<x>_from_<s>`."""
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("cross.")}
    for x, s in model.pairs:
        state |= {f"cross.{x}_from_{s}.{name}": value for name, value in model.cross.single(x, s).state_dict().items()}
    return {name: value.detach().numpy() for name, value in state.items()}


def perturbed(model: JMT) -> JMT:
    """Biases and norms away from 0 and 1, so that a forgotten one shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.05 * torch.randn_like(parameter) if parameter.ndim == 1 or "bias" in name else 0
    return model


@pytest.mark.parametrize("name", PRESETS)
def test_equals_numpy(name: str) -> None:
    torch.manual_seed(5)
    model = perturbed(JMT(PRESETS[name]).double().eval())
    audio, visual = torch.randn(2, 8, 512).double(), torch.randn(2, 8, 512).relu().double()
    mask = torch.tensor([[True] * 8, [True, False, True, True, True, False, False, True]])
    with torch.no_grad():
        found = model(audio, visual, mask).numpy()
        unmasked = model(audio[:1], visual[:1]).numpy()
    for i in range(2):
        valid = mask[i].numpy()
        a, v = (x[i].numpy() * valid[:, None] for x in (audio, visual))
        wanted = reference.jmt(arrays(model), PRESETS[name], a, v, valid)
        assert np.abs(found[i][valid] - wanted[valid]).max() < 1e-9
        if valid.all():
            assert np.abs(unmasked[0] - wanted).max() < 1e-9


D, H = 512, 128


def attention_size() -> int:
    return 4 * D * D + 2 * D  # four matrices; biases of the rows and the output


def encoder_size(feedforward: int = 512) -> int:
    return attention_size() + 2 * 2 * D + D * feedforward + feedforward + feedforward * D + D


def targets_size(width: int) -> int:
    return 2 * (width * H + H + H + 1)


def test_parameter_counts() -> None:
    reduce = 1024 * D + D
    concat = 6 * D * 1024 + 1024 + targets_size(1024)
    wanted = {
        "paper": reduce + 3 * encoder_size() + 6 * attention_size() + concat,
        "reference": reduce + 3 * encoder_size() + 3 * attention_size() + encoder_size() + attention_size() + targets_size(D),
        "vanilla": 2 * encoder_size() + 2 * attention_size() + 2 * D * 1024 + 1024 + targets_size(1024),
    }
    for name, count in wanted.items():
        assert sum(p.numel() for p in JMT(PRESETS[name]).parameters()) == count, name
    assert wanted["paper"] == 14_962_690


def test_six_cross_attentions_of_their_own_or_three_shared_by_the_query_modality() -> None:
    every = [(x, s) for x in ("audio", "visual", "joint") for s in ("audio", "visual", "joint") if x != s]
    for cross, different in (("separate", 6), ("shared", 3)):
        model = JMT(JmtOptions(cross=cross))  # type: ignore[arg-type]
        assert sorted(model.pairs) == sorted(every)
        queries = {(x, s): model.cross.single(x, s).state_dict() for x, s in every}
        for name in ("query.weight", "key.weight", "value.weight", "out.weight"):
            assert len({tuple(state[name][0, :4].tolist()) for state in queries.values()}) == different, (cross, name)
        if cross == "shared":
            assert all(torch.equal(queries[x, s]["key.weight"], queries[x, t]["key.weight"]) for x, s in every for y, t in every if x == y)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("masked", [False, True])
def test_batched_cross_attentions_equal_one_after_the_other(name: str, masked: bool) -> None:
    torch.manual_seed(6)
    model = perturbed(JMT(PRESETS[name]))
    streams = {stream: torch.randn(3, 8, 512) for stream in model.encoders}
    mask = torch.rand(3, 8) > 0.3 if masked else None
    with torch.no_grad():
        found = model.cross(streams, mask)
        wanted = torch.stack([model.cross.single(x, s)(streams[x], streams[s], mask) for x, s in model.pairs])
    scale = float(wanted.abs().max())
    assert (found - wanted).abs().max() < 1e-6 * max(1.0, scale)
    assert len({float(one.abs().sum()) for one in wanted}) == len(model.pairs)  # so that a swapped pair would show


def test_shared_pairs_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="next to one another"):
        CrossAttentions(AttentionStyle(), [("a", "b"), ("b", "a"), ("a", "c")], shared=True, width=8)


def test_self_attention_head_reads_audio_from_joint() -> None:
    assert JMT(PRESETS["reference"]).pairs[-1] == ("audio", "joint")


@pytest.mark.parametrize(
    "options",
    [*PRESETS.values(), JmtOptions(positional="learned"), JmtOptions(positional="sinusoidal", dropout=0.2, cross="shared")],
    ids=lambda o: f"{o.score}-{o.head}-{o.positional}",
)
def test_every_parameter_gets_a_gradient(options: JmtOptions) -> None:
    torch.manual_seed(0)
    model = JMT(options)
    model(torch.randn(3, 8, 512), torch.randn(3, 8, 512)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]


def test_positional_encoding_tells_order() -> None:
    a, v = torch.randn(1, 8, 512), torch.randn(1, 8, 512)
    for positional, ordered in (("none", False), ("sinusoidal", True), ("learned", True)):
        model = JMT(JmtOptions(positional=positional)).eval()
        same = torch.allclose(model(a.flip(1), v.flip(1)).flip(1), model(a, v), atol=1e-3)
        assert same is not ordered, positional


def test_it_trains_with_the_papers_optimiser() -> None:
    """SGD, 5e-4 and momentum 0.9, gradients clipped at 1 (DESIGN section 9), on a target both modalities hold a part of."""
    torch.manual_seed(0)
    model = JMT()
    optimiser = torch.optim.SGD(model.parameters(), lr=5e-4, momentum=0.9)
    a, v = torch.randn(4, 8, 512), torch.randn(4, 8, 512)
    target = torch.stack((v[..., :64].mean(-1), a[..., :64].mean(-1)), -1) * 4
    losses = []
    for _ in range(12):
        loss = (model(a, v) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses


def test_errors() -> None:
    with pytest.raises(UserError, match=r"fusion\.jmt\.heads=3 does not divide"):
        JMT(JmtOptions(heads=3))
    model = JMT()
    with pytest.raises(ValueError, match=r"not \[1, 8, 512\] and \[1, 7, 512\]"):
        model(torch.zeros(1, 8, 512), torch.zeros(1, 7, 512))
    with pytest.raises(ValueError, match=r"should both be \[B, L, 512\]"):
        model(torch.zeros(1, 8, 256), torch.zeros(1, 8, 256))
    with pytest.raises(ValueError, match="mask"):
        model(torch.zeros(2, 8, 512), torch.zeros(2, 8, 512), torch.ones(2, 7, dtype=torch.bool))
