"""The stages on the device: training steps by setting, whole loops with their data, features, fusion, and the hours they add up to."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from common import alternate, median
from gpu_setting import TERA, Setting, rate
from loader_data import crop_path
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from jmt_dist.affwild2.layout import find_dataset
from jmt_dist.config import AudioOptions, DataOptions, EngineOptions, FusionOptions, OptimizerOptions, ScheduleOptions, VisualOptions
from jmt_dist.data.geometry import CLIPS, OFFSETS, SIZE, SUBSEQUENCE, strip_frames
from jmt_dist.data.pipeline import ClipLoader, clips
from jmt_dist.data.sample import parse_key
from jmt_dist.data.shards import Manifest
from jmt_dist.data.tars import parse_index
from jmt_dist.model.heads import AudioModel, VisualModel
from jmt_dist.model.zoo import make_fusion
from jmt_dist.train.ccc import ccc_loss
from jmt_dist.train.engine import autocast, input_type, make_engine

# the real dataset (benchmarks/rehearse_full_scale.py): samples in all, about those of a fold's training and validation part
SAMPLES, TRAIN, VALIDATION = 47_968, 28_000, 9_600
HOUR = 3600 * 30 // SUBSEQUENCE + 1  # samples of an hour of video at 30 frames per second


def _engine(setting: Setting, model: nn.Module, options: EngineOptions, optimizer: OptimizerOptions, batch: int) -> Any:
    return make_engine(
        model, engine=options, optimizer=optimizer, schedule=ScheduleOptions(), steps=10**6, micro_batch=batch, accumulation=1,
        device=setting.device,
    )  # fmt: skip


def _visual_options(setting: Setting) -> VisualOptions:
    return VisualOptions(depth=setting.options.depth, size=setting.options.size, weights="none")  # type: ignore[arg-type]


def _step(engine: Any, kind: torch.dtype, target: Tensor, *inputs: Tensor) -> None:
    found = engine(*(value.to(kind) for value in inputs))
    engine.backward(ccc_loss(found[1] if isinstance(found, tuple) else found, target).value)
    engine.step()


def _visual_inputs(setting: Setting, batch: int, last: bool) -> tuple[Tensor, Tensor]:
    """Frames [B, 8, 3, 8, S, S], as the loader's views (`last`) or contiguous, and labels [B, 8, 2]."""
    side = setting.options.size
    frames = clips(torch.randn(batch, SUBSEQUENCE, side, side, 3, device=setting.device))
    return frames if last else frames.contiguous(), torch.rand(batch, CLIPS, 2, device=setting.device) * 2 - 1


def _visual_engine(setting: Setting, precision: str, last: bool, compiled: bool, batch: int) -> Any:
    options = EngineOptions(precision=precision, compile=compiled, channels_last=last)  # type: ignore[arg-type]
    return _engine(setting, VisualModel(_visual_options(setting)), options, OptimizerOptions(lr=1e-3), batch)


def visual_steps(setting: Setting, found: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """Subsequences per second of a training step on data that is already there, setting by setting; memory; share of the rates."""
    ceilings = found.get("ceilings", {})
    flops = ceilings.get("flop_per_subsequence", 0.0)
    tries = [("fp32", False, False), ("autocast", False, False), ("autocast", True, False), ("autocast", True, True)]
    plans = [(*each, setting.options.batch) for each in tries]
    rows, values = [], []
    best: dict[str, Any] = {}
    for precision, last, compiled, batch in itertools.chain(plans, (("autocast", True, None, size) for size in setting.options.larger)):
        compiled = bool(best.get("compile")) if compiled is None else compiled
        row: dict[str, Any] = {"precision": precision, "channels_last_3d": last, "compile": compiled, "batch": batch}
        setting.peak_gb()
        try:
            engine = _visual_engine(setting, precision, last, compiled, batch)
            frames, target = _visual_inputs(setting, batch, last)
            kind = input_type(EngineOptions(precision=precision))  # type: ignore[arg-type]
            seconds = setting.seconds(partial(_step, engine, kind, target, frames))
            row |= {"subsequences_per_s": rate(batch / seconds), "tflop_s": rate(flops * batch / seconds / TERA)}
            engine.destroy()
            del engine, frames
        except torch.OutOfMemoryError:
            row["refused"] = "out of memory"
            torch.cuda.empty_cache()
        row["peak_gb"] = setting.peak_gb()
        values.append(row)
        if row.get("subsequences_per_s", 0.0) > best.get("subsequences_per_s", 0.0):
            best = row
        name = f"{precision}{', channels last' * last}{', compiled' * compiled}, batch {batch}"
        share = row.get("tflop_s", 0.0) / ceilings.get("convolutions_tflop_s", float("inf"))
        beside = f"{share:.0%} of the convolutions' rate, {row['peak_gb']} GB"
        rows.append([name, f"{row['subsequences_per_s']:.1f} subsequences/s" if "tflop_s" in row else row["refused"], beside])
    result = {"steps": values, "best": best}
    if ceilings:
        result["share_of_convolutions"] = rate(best["tflop_s"] / ceilings["convolutions_tflop_s"])
        result["share_of_bf16_matrix"] = rate(best["tflop_s"] / ceilings["bf16_matrix_tflop_s"])
    return result, rows


class _LooseFrames(Dataset[tuple[Tensor, Tensor]]):
    """Subsequences as the published code reads them: 64 crops by Pillow, resized and normalised one by one."""

    def __init__(self, setting: Setting) -> None:
        units = {unit.name: unit for unit in find_dataset(setting.source).units}
        self.size = setting.options.size
        self.items = [
            [crop_path(units[unit].crops, int(frame)) for frame in strip_frames(m, p)[:SUBSEQUENCE]]
            for unit, m, p in _keys(setting.manifest)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        frames = [self._one(path) for path in self.items[item]]
        return torch.stack(frames, dim=1).unflatten(1, (CLIPS, -1)).transpose(0, 1), torch.rand(CLIPS, 2) * 2 - 1

    def _one(self, path: str) -> Tensor:
        image = Image.open(path).convert("RGB") if path else Image.new("RGB", (SIZE, SIZE))
        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR))
        return (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - 0.42) / 0.22


def _keys(manifest: Manifest) -> list[tuple[str, int, int]]:
    return [parse_key(entry.key) for shard in manifest.shards for entry in parse_index((manifest.folder / shard.index).read_text())]


def _published_steps(setting: Setting, batch: int) -> Callable[[], float]:
    """Steps as the authors' public code makes them: Pillow per file, one sample at a time through the backbone, fp16 autocast."""
    device = setting.device
    model = VisualModel(_visual_options(setting)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    loader = DataLoader(_LooseFrames(setting), batch_size=batch, num_workers=setting.workers, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def epoch() -> float:
        start = time.perf_counter()
        for _ in range(setting.options.repeats):
            frames, target = (value.to(device) for value in next(batches))
            optimizer.zero_grad()
            with torch.autocast(device.type, half):
                found = torch.cat([model(sample[None])[1] for sample in frames])
                loss = ccc_loss(found.float(), target).value
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        setting.wait()
        return setting.options.repeats * batch / (time.perf_counter() - start)

    return epoch


def visual_end_to_end(setting: Setting, found: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """Our loop from shards with the fastest setting, against the published way from loose files; and what of ours waits for data."""
    best = found.get("visual_steps", {}).get("best") or {"channels_last_3d": True, "compile": False}
    batch, kind = setting.options.batch, torch.float32
    engine = _visual_engine(setting, "autocast", best["channels_last_3d"], best["compile"], batch)
    loader = ClipLoader(
        setting.shards, data=DataOptions(threads=setting.workers), batch=batch, streams=("visual",), size=setting.options.size, crop=104,
        flip=True, device=setting.device,
    )  # fmt: skip
    batches: Iterator[dict[str, Tensor]] = itertools.chain.from_iterable(loader.batches(epoch) for epoch in itertools.count())

    def steps(source: Iterator[dict[str, Tensor]]) -> float:
        start = time.perf_counter()
        for _ in range(setting.options.repeats):
            item = next(source)
            _step(engine, kind, item["va"], clips(item["frames"]))
        setting.wait()
        return setting.options.repeats * batch / (time.perf_counter() - start)

    one = next(batches)
    published = _published_steps(setting, batch)
    sides = {"ours": partial(steps, batches), "ours, data at hand": partial(steps, itertools.repeat(one)), "published": published}
    for side in sides.values():
        side()  # load, compile, start workers
    rounds = alternate(sides, setting.options.rounds)
    medians = {name: median(values) for name, values in rounds.items()}
    ratio = median([medians["ours"] / medians["published"]])
    wait = statistics.median(1 - a / b for a, b in zip(rounds["ours"], rounds["ours, data at hand"], strict=True))
    values = {"subsequences_per_s": medians, "ratio_vs_published": ratio, "data_wait": round(max(0.0, wait), 4), "rounds": rounds}
    rows = [[name, f"{value:.1f} subsequences/s", ""] for name, value in medians.items()]
    rows[0][2], rows[1][2] = f"{ratio:.2f} times the published way (target 5)", f"waits for data {values['data_wait']:.1%} (target 2 %)"
    return values, rows


def audio(setting: Setting, found: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """Subsequences per second of an audio training step under autocast."""
    batch = setting.options.audio_batch
    engine = _engine(setting, AudioModel(AudioOptions(weights="none")), EngineOptions(), OptimizerOptions(name="adam", lr=1e-3), batch)
    mel = torch.randn(batch, CLIPS, 64, 107, device=setting.device)
    target = torch.rand(batch, CLIPS, 2, device=setting.device) * 2 - 1
    setting.peak_gb()
    speed = rate(batch / setting.seconds(partial(_step, engine, torch.float32, target, mel)))
    peak = setting.peak_gb()
    return {"subsequences_per_s": speed, "peak_gb": peak}, [[f"step, batch {batch}", f"{speed:,.0f} subsequences/s", f"{peak} GB"]]


@torch.no_grad()
def features(setting: Setting, found: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """Samples per second of the features stage: both backbones at all offsets, from shards."""
    offsets = list(range(OFFSETS if not setting.options.small else 1))
    visual, audio_model = VisualModel(_visual_options(setting)), AudioModel(AudioOptions(weights="none"))
    visual = visual.to(setting.device, memory_format=torch.channels_last_3d).eval()  # type: ignore[call-overload]
    audio_model = audio_model.to(setting.device).eval()
    loader = ClipLoader(
        setting.shards, data=DataOptions(threads=setting.workers), batch=setting.options.feature_batch, offsets=offsets,
        size=setting.options.size, device=setting.device,
    )  # fmt: skip
    count, start = 0, 0.0
    for number, batch in enumerate(loader.batches()):
        if number == 1:  # the first has loaded kernels and filled queues
            setting.wait()
            start, count = time.perf_counter(), 0
        with autocast("autocast", setting.device):
            for place, offset in enumerate(offsets):
                visual(clips(batch["frames"], offset))
                audio_model(batch["mel"][:, place])
        count += len(batch["id"])
    setting.wait()
    speed = rate(count / (time.perf_counter() - start))
    values = {"samples_per_s": speed, "offsets": len(offsets), "hour_of_video_s": rate(HOUR / speed)}
    rows = [["dense, both backbones", f"{speed:.1f} samples/s", f"{len(offsets)} offsets"]]
    return values, [*rows, ["evaluation of one hour of video", f"{HOUR / speed:.0f} s", "features; fusion is below 1 s of it"]]


def fusion(setting: Setting, found: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """Milliseconds of a fusion training step and subsequences per second, by batch."""
    values, rows = {}, []
    for batch in setting.options.fusion_batches:
        engine = _engine(setting, make_fusion(FusionOptions()), EngineOptions(), OptimizerOptions(lr=5e-4), batch)
        inputs = [torch.randn(batch, CLIPS, 512, device=setting.device) for _ in range(2)]
        target = torch.rand(batch, CLIPS, 2, device=setting.device) * 2 - 1
        seconds = setting.seconds(partial(_step, engine, torch.float32, target, *inputs))
        values[str(batch)] = {"ms_per_step": rate(1000 * seconds), "subsequences_per_s": rate(batch / seconds)}
        rows.append([f"step, batch {batch}", f"{1000 * seconds:.2f} ms", f"{batch / seconds:,.0f} subsequences/s"])
        engine.destroy()
    return values, rows


def hours(setting: Setting, found: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """Hours of the paper's recipe from the rates above. Raises KeyError where a section it needs is missing."""
    visual = found["visual_end_to_end"]["subsequences_per_s"]["ours"]
    audio_rate, feature_rate = found["audio"]["subsequences_per_s"], found["features"]["samples_per_s"]
    fused = found["fusion"][str(min(setting.options.fusion_batches))]["subsequences_per_s"]
    epochs = {"visual": VisualOptions().max_epochs, "audio": AudioOptions().max_epochs, "fusion": FusionOptions().max_epochs}
    dense = feature_rate * found["features"]["offsets"]  # subsequences per second through both backbones without gradients
    seconds = {
        "visual": epochs["visual"] * (TRAIN / visual + VALIDATION / dense),
        "audio": epochs["audio"] * (TRAIN / audio_rate + VALIDATION / dense),
        "features": (TRAIN + VALIDATION) * OFFSETS / dense,
        "fusion": epochs["fusion"] * TRAIN * OFFSETS / fused,
    }
    fold = sum(seconds.values()) / 3600
    values = {
        "formula": "epochs (train / rate + validation / dense rate) for visual and audio; (train + validation) 8 / dense rate for "
        "features; epochs train 8 / rate for fusion; all epochs of the recipe, without early stopping",
        "train_samples": TRAIN, "validation_samples": VALIDATION, "epochs": epochs,
        "hours_of_a_fold": {name: rate(value / 3600) for name, value in seconds.items()},
        "six_folds_on_1_gpu": rate(6 * fold),
        "six_folds_on_8_gpus": rate(fold),  # a fold per card, two cards idle
    }  # fmt: skip
    rows = [
        ["six folds of the paper's recipe, 1 card", f"{6 * fold:.1f} h at most", "without early stopping"],
        ["the same, 8 cards", f"{fold:.1f} h at most", "a fold per card"],
    ]
    return values, rows
