"""The loaders that bench_loader.py compares: ours, loose files, and the peers in their own formats.

Each is a function of `Setting` that prepares its data and returns `epoch() -> iterator of batches`; processes and threads it
needs live on between epochs. All shuffle, all use the same batch and two workers or threads.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_data import Loose, log_mel, normalise, record, tensors
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jmt_dist.config import DataOptions
from jmt_dist.data.geometry import SIZE
from jmt_dist.data.pipeline import ClipLoader
from jmt_dist.data.shards import Manifest, ShardSet

Batch = dict[str, Tensor]
Epochs = Callable[[], Iterator[Batch]]
BUFFER = 64  # samples in webdataset's shuffle buffer: small ones, since nothing is delivered before it is full
CHUNK_SAMPLES = 32  # samples per file of the peers' formats, as in our tars here


@dataclass(frozen=True)
class Setting:
    """What a loader is built from. `out` is a folder for its own format; `threads` are DALI's, `workers` the peers' processes."""

    manifest: Manifest
    loose: list[Loose]
    out: Path
    batch: int
    workers: int
    threads: int

    @property
    def chunk(self) -> int:
        """Samples per file of the peers' formats (1 MB each): several files for every worker."""
        return max(1, min(CHUNK_SAMPLES, len(self.loose) // (2 * self.workers)))


def ours(setting: Setting) -> Epochs:
    """ClipLoader in training mode: the offset of each sample is drawn, all 71 frames of its strip are decoded."""
    manifest = setting.manifest
    tars = tuple(manifest.folder / shard.name for shard in manifest.shards)
    indexes = tuple(manifest.folder / shard.index for shard in manifest.shards)
    shards = ShardSet(tars, indexes, manifest.samples, manifest.hash, "")
    loader = ClipLoader(shards, data=DataOptions(threads=setting.threads), batch=setting.batch)
    epochs = itertools.count()
    return lambda: loader.batches(next(epochs))


class _LooseFiles(Dataset[Batch]):
    """As the published code reads: one JPEG per frame by Pillow, one WAV and one spectrogram per clip."""

    def __init__(self, loose: list[Loose]) -> None:
        self.loose = loose

    def __len__(self) -> int:
        return len(self.loose)

    def __getitem__(self, index: int) -> Batch:
        loose = self.loose[index]
        frames = np.stack([_pixels(path) for path in loose.crops])
        mels = [log_mel(_wave(path)) for path in loose.wavs]
        ident = torch.tensor(loose.id, dtype=torch.int32)
        return {"id": ident, "frames": normalise(torch.from_numpy(frames)), "mel": torch.stack(mels), "va": torch.from_numpy(loose.va)}


def _pixels(path: str) -> Any:
    if not path:
        return np.zeros((SIZE, SIZE, 3), np.uint8)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _wave(path: str) -> Tensor:
    import soundfile

    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def loose_files(setting: Setting) -> Epochs:
    """A DataLoader over loose files."""
    return _loader(_LooseFiles(setting.loose), setting, shuffle=True)


def _loader(dataset: Any, setting: Setting, kind: Any = DataLoader, **extra: Any) -> Epochs:
    loader = kind(dataset, batch_size=setting.batch, num_workers=setting.workers, persistent_workers=True, **extra)
    return lambda: iter(loader)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def webdataset(setting: Setting) -> Epochs:
    """The webdataset library with a DataLoader."""
    import webdataset as wds

    folder = _fresh(setting.out / "webdataset")
    order = np.random.default_rng(0).permutation(len(setting.loose))
    with wds.ShardWriter(f"{folder}/%05d.tar", maxcount=setting.chunk, verbose=0) as writer:
        for k in order:
            writer.write({"__key__": f"{k:06d}", **record(setting.loose[k])})
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = wds.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(BUFFER).map(tensors)
    return _loader(dataset, setting)


def litdata(setting: Setting) -> Epochs:
    """litdata with its own DataLoader."""
    # optimize() deletes <temporary folder>/data and <temporary folder>/chunks, whatever lies there: it gets folders of its own
    scratch = _fresh(setting.out / "litdata-scratch")
    os.environ |= {
        "DATA_OPTIMIZER_CACHE_FOLDER": f"{scratch}/c",
        "DATA_OPTIMIZER_DATA_CACHE_FOLDER": f"{scratch}/d",
        "TMPDIR": str(scratch),
    }
    tempfile.tempdir = None  # read again from the environment
    import litdata as lit

    folder = setting.out / "litdata"
    shutil.rmtree(folder, ignore_errors=True)
    lit.optimize(
        fn=record, inputs=setting.loose, output_dir=str(folder), chunk_size=setting.chunk, num_workers=1, start_method="fork", verbose=False
    )

    class Samples(lit.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Batch:
            return tensors(super().__getitem__(index))

    return _loader(Samples(str(folder), shuffle=True), setting, lit.StreamingDataLoader)


def streaming(setting: Setting) -> Epochs:
    """mosaicml-streaming with a DataLoader."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    folder = setting.out / "streaming"
    shutil.rmtree(folder, ignore_errors=True)
    columns = dict.fromkeys(("strip", "sound", "va", "id"), "bytes")
    with MDSWriter(out=str(folder), columns=columns, size_limit=setting.chunk << 20) as writer:
        for loose in setting.loose:
            writer.write(record(loose))

    class Samples(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Batch:
            return tensors(super().__getitem__(index))

    return _loader(Samples(local=str(folder), shuffle=True, batch_size=setting.batch), setting)


OURS, PIL = "jmt_dist", "pil"
SIDES: dict[str, Callable[[Setting], Epochs]] = {
    OURS: ours, PIL: loose_files, "webdataset": webdataset, "litdata": litdata, "streaming": streaming,
}  # fmt: skip
