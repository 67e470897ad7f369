"""How long forward and backward of every fusion model take, against torch's nn.TransformerEncoder of the same width.

    python benchmarks/bench_fusion.py --json benchmarks/results
    python benchmarks/bench_fusion.py models=[jmt,jmt-usual] batches=[64] lengths=[8]

The yardstick has as many attention layers as JMT (9: three encoders, six cross-attentions), width 512, one head, feed-forward
512 in every layer as in JMT's encoders, dropout 0. `ratio_per_attention_layer` is the yardstick's time per layer divided by the
model's whole time, head and all, per attention layer: above 1 the model is faster. A layer is an attention with one output per clip:
the encoder of the reference preset's head, in which the six outputs of a clip attend to one another, counts six. `ratio_per_operation`
counts instead the multiplications and additions of all matrix products, forward and backward (`gflop`, by torch's FlopCounterMode).
`ratio_to_unbatched` compares JMT with the same parameters run one cross-attention after the other. Times are processor time of one
thread, in turn, medians of rounds.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
from common import Result, run
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jmt_dist.config import FUSION_MODELS, FusionOptions, JmtOptions, Options, Positive
from jmt_dist.model.attention import LENGTH, WIDTH, Attention
from jmt_dist.model.cross import CrossAttentions
from jmt_dist.model.fusion import JMT, SelfAttentionHead
from jmt_dist.model.zoo import make_fusion

PRESETS = {  # besides the names of the zoo, whose `jmt` is the paper's
    "jmt-usual": JmtOptions(score="softmax", rows="query", scale="sqrt"),
    "jmt-reference": JmtOptions(score="softmax", rows="query", scale="sqrt", cross="shared", head="self_attention", normalise=True),
}
YARDSTICK = "transformer-encoder"
LAYERS = 9


class FusionBenchOptions(Options):
    """What is timed."""

    models: Annotated[list[str], Field(min_length=1)] = Field([*FUSION_MODELS, *PRESETS], description="fusion models and presets of JMT")
    batches: Annotated[list[Positive], Field(min_length=1)] = Field([2, 64], description="subsequences per step")
    lengths: Annotated[list[Positive], Field(min_length=1)] = Field([8, 64], description="clips per subsequence")
    rounds: Positive = Field(5, description="rounds, in each of which every side has its turn")
    seconds: Annotated[float, Field(gt=0)] = Field(0.3, description="length of a turn, at least; one step where that takes longer")


class Yardstick(nn.Module):
    """torch's own transformer encoder on the audio features alone."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one head takes no nested tensors
            layer = nn.TransformerEncoderLayer(WIDTH, 1, 512, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, LAYERS)

    def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
        """[B, L, 512] × 2 → [B, L, 512]."""
        return self.encoder(audio)


class OneByOne(nn.Module):
    """Cross-attentions as separate modules, called one after the other: what `CrossAttentions` batches."""

    def __init__(self, cross: CrossAttentions) -> None:
        super().__init__()
        self.pairs = cross.pairs
        self.each = nn.ModuleList(cross.single(x, s) for x, s in cross.pairs)

    def forward(self, streams: dict[str, Tensor], mask: Tensor | None) -> Tensor:
        """As `CrossAttentions.forward`."""
        return torch.stack([one(streams[x], streams[s], mask) for one, (x, s) in zip(self.each, self.pairs, strict=True)])


def sides(names: list[str]) -> dict[str, nn.Module]:
    """The models by name, JMTs also one by one, and the yardstick."""
    found: dict[str, nn.Module] = {YARDSTICK: Yardstick()}
    for name in names:
        options = FusionOptions(jmt=PRESETS.get(name, JmtOptions()))
        found[name] = make_fusion(options, "jmt" if name in PRESETS else name)
        model = make_fusion(options, "jmt") if name == "jmt" or name in PRESETS else None
        if isinstance(model, JMT):
            model.load_state_dict(found[name].state_dict())
            model.cross = OneByOne(model.cross)  # type: ignore[assignment]
            found[f"{name}/one-by-one"] = model
    return found


def attention_layers(model: nn.Module) -> int:
    """How many attentions with one output per clip a model computes: a shared one counts for each pair it serves, the encoder of a
    self-attention head for each output that attends in it."""
    if isinstance(model, Yardstick):
        return LAYERS
    batched = sum(len(module.pairs) for module in model.modules() if isinstance(module, CrossAttentions))
    within = len(model.pairs) - 1 if isinstance(model, JMT) and isinstance(model.head, SelfAttentionHead) else 0
    return batched + within + sum(isinstance(module, Attention) for module in model.modules())


def gflop(step: Callable[[], None]) -> float:
    """Billions of multiplications and additions in the matrix products of a step; the fused attention's would go uncounted."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return float(counter.get_total_flops() / 1e9)


def step_of(model: nn.Module, audio: Tensor, visual: Tensor) -> Callable[[], None]:
    """One forward and backward pass."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(audio, visual).square().mean().backward()

    return step


def turn(step: Callable[[], None], seconds: float) -> float:
    """Milliseconds of processor time of one step, averaged over steps for at least `seconds`."""
    start, count = time.process_time(), 0
    while count == 0 or time.process_time() - start < seconds:
        step()
        count += 1
    return (time.process_time() - start) / count * 1000


def bench(options: FusionBenchOptions, out: Path) -> Result:
    """Time every side at every batch and length."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = sides(options.models)
    table = [
        [
            "model",
            "parameters",
            *(f"ms, batch {b}, L {n}" for b in options.batches for n in options.lengths),
            "per layer, per operation (last)",
        ]
    ]
    cases: dict[str, dict[str, dict[str, float]]] = {}
    for batch in options.batches:
        for length in options.lengths:
            cases[f"batch{batch}-length{length}"] = case(models, batch, length, options)
    for name, model in models.items():
        found = [times.get(name, {}) for times in cases.values()]
        cells = [f"{one['ms']:.1f}" if one else "–" for one in found]
        last = [found[-1].get(f"ratio_per_{what}") for what in ("attention_layer", "operation")]
        table.append([name, f"{parameters(model):,}", *cells, ", ".join(f"{x:.2f}" if x else "–" for x in last)])
    sizes = {name: {"parameters": parameters(model), "attention_layers": attention_layers(model)} for name, model in models.items()}
    return Result({"models": sizes, "cases": cases}, table)


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def case(models: dict[str, nn.Module], batch: int, length: int, options: FusionBenchOptions) -> dict[str, dict[str, float]]:
    """Median milliseconds of each model, and its ratios; models of a fixed length are left out at another."""
    audio, visual = torch.randn(batch, length, WIDTH), torch.randn(batch, length, WIDTH)
    steps = {name: step_of(model, audio, visual) for name, model in models.items() if name != "jca" or length == LENGTH}
    times: dict[str, list[float]] = {name: [] for name in steps}
    work = {name: gflop(step) for name, step in steps.items()}  # and the first step, which is slower than others
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(turn(step, options.seconds))
    medians = {name: statistics.median(values) for name, values in times.items()}
    found = {}
    for name, middle in medians.items():
        found[name] = {"ms": middle, "ms_lowest": min(times[name]), "ms_highest": max(times[name]), "gflop": work[name]}
        found[name]["ratio_per_operation"] = (medians[YARDSTICK] / work[YARDSTICK]) / (middle / work[name])
        layers = attention_layers(models[name])
        if layers and "/" not in name:
            found[name]["ratio_per_attention_layer"] = (medians[YARDSTICK] / LAYERS) / (middle / layers)
        if f"{name}/one-by-one" in medians:
            found[name]["ratio_to_unbatched"] = medians[f"{name}/one-by-one"] / middle
    return found


if __name__ == "__main__":
    run(bench, __doc__, FusionBenchOptions, "fusion")
