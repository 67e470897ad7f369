"""A modality that is missing: withheld in training at random, withheld in evaluation, and what a fold says of it."""

from __future__ import annotations

import numpy as np
import torch

from jmt_dist.config import FusionOptions
from jmt_dist.data.features import FeatureSet
from jmt_dist.model.zoo import make_fusion
from jmt_dist.train.fuse import predict_all, withhold


def batch(count: int) -> dict[str, torch.Tensor]:
    ident = torch.stack([torch.arange(count) // 40, torch.arange(count) // 4 % 10, torch.arange(count) % 4, torch.zeros(count).long()], 1)
    return {
        "audio": torch.ones(count, 8, 512), "visual": torch.full((count, 8, 512), 2.0), "id": ident, "q": torch.arange(count) % 8,
    }  # fmt: skip


def gone(features: torch.Tensor) -> torch.Tensor:
    flat = features.flatten(1)
    assert ((flat == 0).all(1) | (flat != 0).all(1)).all()  # a whole subsequence or nothing of it
    return (flat == 0).all(1)


def test_a_share_of_subsequences_loses_one_modality_never_both() -> None:
    given = batch(4000)
    audio, visual = withhold(given, 0.3, seed=5)
    no_audio, no_visual = gone(audio), gone(visual)
    assert not (no_audio & no_visual).any()
    # 4,000 draws of 0.15 each: a standard deviation of 0.0056
    assert abs(float(no_audio.float().mean()) - 0.15) < 0.025 and abs(float(no_visual.float().mean()) - 0.15) < 0.025
    assert torch.equal(given["audio"], torch.ones(4000, 8, 512))  # the batch itself is untouched
    other = withhold(given, 0.3, seed=6)
    assert not torch.equal(gone(other[0]), no_audio)  # another step, another draw


def test_the_draw_does_not_depend_on_the_division_over_ranks() -> None:
    given = batch(64)
    whole = withhold(given, 0.5, seed=1)
    for part in (slice(0, 20), slice(20, 64)):
        found = withhold({name: value[part] for name, value in given.items()}, 0.5, seed=1)
        assert all(torch.equal(a, b[part]) for a, b in zip(found, whole, strict=True))


def test_nothing_is_withheld_by_default() -> None:
    given = batch(8)
    assert FusionOptions().modality_dropout == 0
    assert all(a is b for a, b in zip(withhold(given, 0.0, 1), (given["audio"], given["visual"]), strict=True))


def features(samples: int) -> FeatureSet:
    generator = np.random.default_rng(0)
    ident = np.zeros((samples, 4), np.int32)
    ident[:, 2] = np.arange(samples)
    visual, audio = (generator.normal(size=(samples, 2, 8, 512)).astype(np.float16) for _ in range(2))
    return FeatureSet(visual, audio, np.zeros((samples, 64, 2), np.float32), ident, (1, 5))


def test_withheld_in_evaluation_is_that_modality_at_zero() -> None:
    torch.manual_seed(0)
    net, stored = make_fusion(FusionOptions(model="concat")).eval(), features(3)
    flat = [torch.from_numpy(np.asarray(x, np.float32)).flatten(0, 1) for x in (stored.audio, stored.visual)]
    for name, place in (("audio", 0), ("visual", 1)):
        inputs = list(flat)
        inputs[place] = torch.zeros_like(inputs[place])
        with torch.no_grad():
            wanted = net(*inputs).reshape(3, 2, 8, 2).numpy()
        found = predict_all(net, stored, torch.device("cpu"), name)
        assert np.allclose(found, wanted, atol=1e-5)
        assert not np.allclose(found, predict_all(net, stored, torch.device("cpu")), atol=1e-3)


def test_one_modality_alone_does_not_mind_the_other_missing() -> None:
    torch.manual_seed(0)
    net, stored = make_fusion(FusionOptions(model="audio")), features(2)
    cpu = torch.device("cpu")
    assert np.array_equal(predict_all(net, stored, cpu, "visual"), predict_all(net, stored, cpu))
