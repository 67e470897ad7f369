"""Decoding on the device: strips by batch size and decoder setting, against frames one by one, torchvision and Pillow."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import alternate, median
from gpu_setting import GIGA, Setting, rate
from loader_data import shard_samples
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jmt_dist.data.geometry import SIZE, STRIP
from jmt_dist.data.strip import make_strip, split
from jmt_dist.data.tars import ShardWriter, index_text

LOADS, HUFFMAN = (0.0, 0.65, 1.0), (1_000_000, 100_000)  # of the hardware decoder; pixels above which the GPU undoes Huffman codes
MODES = ("restart markers", "coefficients")


def decode(setting: Setting, found: dict[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    """Frames per second of each way; values hold every setting, the table the best of the strips and the others."""
    strips = [sample.strip for sample in shard_samples(setting.manifest)]
    frames = [frame for strip in strips for frame in split(strip)]
    values: dict[str, Any] = {"strips": [], "strip_bytes": sum(map(len, strips)) / len(strips)}
    tars = {"restart markers": _tar(setting.folder / "strips", strips)}
    tars["coefficients"] = _tar(setting.folder / "optimised", [_recoded(strip) for strip in strips])
    gpu = setting.device.type == "cuda"
    best: tuple[float, dict[str, Any]] = (0.0, {})
    for mode, batch in itertools.product(MODES, setting.options.decode_batches):
        for load, threshold in itertools.product(LOADS if gpu else LOADS[:1], HUFFMAN if gpu else HUFFMAN[:1]):
            row: dict[str, Any] = {"strip": mode, "batch": batch, "hw_decoder_load": load, "hybrid_huffman_threshold": threshold}
            try:
                run = _pipeline(setting, tars[mode], batch, STRIP, load, threshold)
                row["frames_per_s"] = rate(batch * STRIP / setting.seconds(run))
            except RuntimeError as error:  # a decoder that refuses a strip is a finding, not the end of the section
                row["refused"] = str(error).strip().splitlines()[-1][:200]
            values["strips"].append(row)
            if row.get("frames_per_s", 0.0) > best[0]:
                best = (row["frames_per_s"], row)
    batch = best[1]["batch"]
    strip = _pipeline(setting, tars[best[1]["strip"]], batch, STRIP, best[1]["hw_decoder_load"], best[1]["hybrid_huffman_threshold"])
    single = _pipeline(setting, _tar(setting.folder / "frames", frames), batch * STRIP, 1, best[1]["hw_decoder_load"], HUFFMAN[0])
    sides: dict[str, Callable[[], Any]] = {"strips": strip, "one tar sample per frame": single}
    if gpu:  # torchvision's is a CUDA decoder
        sides["torchvision, frames"] = partial(_torchvision, frames[: batch * STRIP], setting.device)
    pillow = _Pillow(frames, setting.workers, batch)
    sides[f"Pillow, {setting.workers} DataLoader workers"] = pillow
    counts = dict.fromkeys(sides, batch * STRIP)
    found_rates = alternate({name: partial(_rate, setting, side, counts[name]) for name, side in sides.items()}, setting.options.rounds)
    medians = {name: median(rates) for name, rates in found_rates.items()}
    pillow.close()
    bandwidth = found.get("ceilings", {}).get("host_to_device_gb_s")
    jpeg = medians["strips"] * values["strip_bytes"] / STRIP / GIGA
    values |= {"best": best[1], "frames_per_s": medians, "rounds": found_rates, "jpeg_gb_per_s": rate(jpeg)}
    rows = [
        [name, f"{value:,.0f} frames/s", f"strips are {medians['strips'] / value:.2f} times as fast"] for name, value in medians.items()
    ]
    settings = ", ".join(f"{name} {value}" for name, value in best[1].items() if name != "frames_per_s")
    rows[0][2] = settings
    rows.append(["JPEG bytes", f"{jpeg:.3f} GB/s", f"copies to the device: {bandwidth} GB/s"])
    return values, rows


def _recoded(strip: bytes) -> bytes:
    """The strip of the same frames with optimised tables of their own, as mode 1 joins them: another stream, the same pictures."""
    files = []
    for frame in split(strip):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(frame)).save(buffer, "JPEG", quality="keep", optimize=True)
        files.append(buffer.getvalue())
    return make_strip(files).data


def _tar(folder: Path, pictures: list[bytes]) -> Path:
    """A tar of one `strip.jpg` per sample, with its index beside it."""
    folder.mkdir()
    path = folder / "00000.tar"
    with ShardWriter(path) as tar:
        for number, picture in enumerate(pictures):
            tar.add(f"{number:07d}", [("strip.jpg", picture)])
    path.with_suffix(".idx").write_text(index_text(tar.entries))
    return path


def _pipeline(setting: Setting, tar: Path, batch: int, frames: int, load: float, threshold: int) -> Callable[[], Any]:
    """A function that runs one batch of a DALI pipeline: reader, decoder, float normalisation; pictures of `frames` frames each."""
    from nvidia.dali import fn, pipeline_def, types

    from jmt_dist.data.graph import MEAN, STD

    gpu = setting.device.type == "cuda"

    @pipeline_def(batch_size=batch, num_threads=setting.workers, device_id=setting.device.index if gpu else None)
    def graph() -> Any:
        read = fn.readers.webdataset(
            paths=[str(tar)], index_paths=[str(tar.with_suffix(".idx"))], ext=["strip.jpg"], dtypes=[types.UINT8], pad_last_batch=True
        )
        read = read[0] if isinstance(read, list | tuple) else read
        extra: dict[str, Any] = {}
        if gpu:
            extra = {"hw_decoder_load": load, "hybrid_huffman_threshold": threshold}
            extra |= {"preallocate_width_hint": SIZE, "preallocate_height_hint": SIZE * frames}
        pictures = fn.decoders.image(read, device="mixed" if gpu else "cpu", output_type=types.RGB, **extra)
        pictures = fn.reshape(pictures, shape=[frames, SIZE, SIZE, 3], layout="FHWC")
        return fn.crop_mirror_normalize(pictures, mean=MEAN, std=STD, dtype=types.FLOAT, output_layout="FHWC")

    pipe = graph()
    pipe.build()
    return pipe.run


def _torchvision(frames: list[bytes], device: torch.device) -> Tensor:
    from torchvision.io import decode_jpeg

    data = [torch.frombuffer(bytearray(frame), dtype=torch.uint8) for frame in frames]
    return torch.stack(decode_jpeg(data, device=device)).float()


class _Frames(Dataset[Tensor]):
    """Strips' frames by Pillow, a strip's worth per item."""

    def __init__(self, frames: list[bytes]) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames) // STRIP

    def __getitem__(self, item: int) -> Tensor:
        import numpy as np

        chosen = self.frames[item * STRIP : (item + 1) * STRIP]
        return torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")) for frame in chosen])).float()


class _Pillow:
    """Batches from workers that never stop."""

    def __init__(self, frames: list[bytes], workers: int, batch: int) -> None:
        self._loader = DataLoader(_Frames(frames), batch_size=batch, num_workers=workers, shuffle=False, drop_last=True)
        self._batches = itertools.chain.from_iterable(itertools.repeat(self._loader))
        if not len(self._loader):
            raise ValueError(f"{len(frames)} frames are less than a batch of {batch} strips: give more units")

    def __call__(self) -> Any:
        return next(self._batches)

    def close(self) -> None:
        """End the workers."""
        del self._batches, self._loader


def _rate(setting: Setting, run: Callable[[], Any], frames: int) -> float:
    return frames / setting.seconds(run)
