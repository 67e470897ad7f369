"""What all loaders of bench_loader.py deliver, from loose files and independent references.

A sample is a subsequence: 64 crops of every 4th frame, the sound of its 8 clips, their labels. Batches are dicts of
id [B, 4] int32, frames [B, 64, 112, 112, 3] float32 (RGB, normalised), mel [B, 8, 64, 107] float32, va [B, 8, 2] float32.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jmt_dist.affwild2.labels import read_labels
from jmt_dist.affwild2.layout import find_dataset
from jmt_dist.data.geometry import CLIPS, OFFSETS, RATE, SIZE, SUBSEQUENCE, WINDOW, end_frames, strip_frames
from jmt_dist.data.jpeg import parse
from jmt_dist.data.sample import Sample, decode_audio, encode_audio, key
from jmt_dist.data.shards import Manifest
from jmt_dist.data.sound import spectrograms
from jmt_dist.data.strip import join

# what the loader promises (DESIGN section 7), written down here anew: the reference shares no number with the code it judges
MEAN, STD = [255 * v for v in (0.43216, 0.394666, 0.37645)], [255 * v for v in (0.22803, 0.22145, 0.216989)]
N_FFT, HANN, HOP, MELS, TOP_DB, MEL_MEAN, MEL_STD = 1024, 882, 441, 64, 80.0, -14.8, 19.895
# mel to 1e-3 dB within 60 dB of a clip's peak and 1e-2 below, plus rounding of float32
MEL_NEAR, MEL_FAR, NEAR_DB = 1.2e-3 / MEL_STD, 1.2e-2 / MEL_STD, 60.0
FRAME_TOLERANCE = 1e-5  # of normalised values: an 8-bit level is 0.017


@dataclass(frozen=True)
class Loose:
    """A sample at offset 0 as loose files: 64 crops ("" = none, black), 8 WAVs of a clip each, labels [8, 2]."""

    id: tuple[int, int, int, int]
    crops: tuple[str, ...]
    wavs: tuple[str, ...]
    va: NDArray[np.float32]


def loose_samples(source: Path, manifest: Manifest, out: Path) -> list[Loose]:
    """All samples of a packed dataset as loose files; writes the WAVs of the clips to `out` unless they are there."""
    units = {unit.name: unit for unit in find_dataset(source).units}
    found = []
    out.mkdir(parents=True, exist_ok=True)
    for sample in shard_samples(manifest):
        index, m, p = (int(value) for value in sample.id[:3])
        unit = units[manifest.units[index].name]
        assert unit.labels is not None
        crops = tuple(crop_path(unit.crops, int(frame)) for frame in strip_frames(m, p)[:SUBSEQUENCE])
        wavs = tuple(str(out / f"{key(unit.name, m, p)}-{j}.wav") for j in range(CLIPS))
        if not Path(wavs[-1]).is_file():
            for path, clip in zip(wavs, clips_of(sample, 0), strict=True):
                Path(path).write_bytes(encode_audio(clip, "wav"))
        found.append(Loose((index, m, p, int(sample.id[3])), crops, wavs, label_rows(unit.labels, m, p, 0)))
    return sorted(found, key=lambda loose: loose.id)


def shard_samples(manifest: Manifest) -> list[Sample]:
    """Every sample of a shard folder, read by tarfile."""
    members: dict[str, dict[str, bytes]] = {}
    for shard in manifest.shards:
        with tarfile.open(manifest.folder / shard.name) as tar:
            for info in tar:
                name, _, extension = info.name.partition(".")
                file = tar.extractfile(info)
                assert file is not None
                members.setdefault(name, {})[extension] = file.read()
    return [Sample.from_members(found) for found in members.values()]


def crop_path(folders: Sequence[Path], frame: int) -> str:
    """The file of a source frame, "" where there is none."""
    return next((str(path) for path in (folder / f"{frame:05d}.jpg" for folder in folders) if path.is_file()), "")


def clips_of(sample: Sample, q: int) -> NDArray[np.int16]:
    """The sound [8, 47040] of the clips of a sample at offset q."""
    pcm = decode_audio(sample.audio, sample.kind)
    return np.stack([pcm[end - WINDOW : end] for end in sample.ends[q::OFFSETS]])


def label_rows(path: Path, m: int, p: int, q: int) -> NDArray[np.float32]:
    """Labels [8, 2] of the end frames of the clips of sample (m, p) at offset q; NaN past the end."""
    va = read_labels(path)
    rows = end_frames(m, p)[q::OFFSETS] - 1
    return np.where((rows < len(va))[:, None], va[np.minimum(rows, len(va) - 1)], np.float32(np.nan)).astype(np.float32)


# ---- what the peers' own formats hold, and how their samples become tensors


def record(loose: Loose) -> dict[str, bytes]:
    """A sample for litdata, mosaicml-streaming and webdataset. They get our strips: 64 JPEGs a sample are slower for all three."""
    strip = join([parse(Path(path).read_bytes())[0] if path else None for path in loose.crops])
    sound = b"".join(Path(path).read_bytes()[44:] for path in loose.wavs)
    return {"strip": strip, "sound": sound, "va": loose.va.tobytes(), "id": np.array(loose.id, np.int32).tobytes()}


def tensors(found: dict[str, bytes]) -> dict[str, Tensor]:
    """The tensors of a record, by the fastest ways known here: libjpeg-turbo without a copy, whole rows normalised, our spectrograms."""
    import simplejpeg

    frames = simplejpeg.decode_jpeg(found["strip"], "RGB").reshape(SUBSEQUENCE, SIZE, SIZE, 3)
    sound = torch.frombuffer(bytearray(found["sound"]), dtype=torch.int16)
    va = np.frombuffer(found["va"], np.float32).reshape(CLIPS, 2).copy()
    return {
        "id": torch.from_numpy(np.frombuffer(found["id"], np.int32).copy()),
        "frames": normalise_rows(torch.from_numpy(frames)),
        "mel": spectrograms([sound], WINDOW * torch.arange(1, CLIPS + 1)[None])[0],
        "va": torch.from_numpy(va),
    }


def normalise(frames: Tensor) -> Tensor:
    """uint8 [.., 3] to float32 with Kinetics statistics, in place after the one conversion."""
    return frames.float().sub_(_MEAN).mul_(_SCALE)


def normalise_rows(frames: Tensor) -> Tensor:
    """The same, whole rows of pixels at a time: a third of the time, since a loop over three channels is no loop for a processor."""
    rows = frames.reshape(-1, 3 * SIZE).float()
    return rows.mul_(_SCALE.repeat(SIZE)).sub_((_MEAN * _SCALE).repeat(SIZE)).view(frames.shape)


def log_mel(waves: Tensor) -> Tensor:
    """Log-mel spectrograms [.., 64, 107] of clips [.., 47040] by torch (DESIGN section 7)."""
    spectrum = torch.stft(waves, N_FFT, HOP, HANN, _WINDOW, center=True, pad_mode="reflect", return_complex=True)
    power = spectrum.real.square().add_(spectrum.imag.square())
    db = torch.matmul(_bank(), power).clamp_(min=1e-10).log10_().mul_(10)
    return torch.maximum(db, db.amax((-2, -1), keepdim=True) - TOP_DB).sub_(MEL_MEAN).div_(MEL_STD)


_MEAN, _SCALE = torch.tensor(MEAN), 1 / torch.tensor(STD)
_WINDOW = torch.hann_window(HANN, periodic=True)
_BANK: list[Tensor] = []


def _bank() -> Tensor:
    if not _BANK:
        import librosa

        _BANK.append(torch.from_numpy(librosa.filters.mel(sr=RATE, n_fft=N_FFT, n_mels=MELS, htk=True, norm=None)))
    return _BANK[0]


# ---- agreement


class Reference:
    """What a sample should be: crops decoded by Pillow, spectrograms by librosa in float64, labels from the label files."""

    def __init__(self, source: Path, manifest: Manifest, count: int) -> None:
        self._units = {unit.name: unit for unit in find_dataset(source).units}
        self._manifest = manifest
        samples = sorted(shard_samples(manifest), key=lambda sample: tuple(sample.id.tolist()))
        self.all = {tuple(sample.id.tolist()) for sample in samples}
        self.samples = {tuple(sample.id.tolist()): sample for sample in samples[:: max(1, len(samples) // count)]}
        self._mels: dict[tuple[Any, ...], NDArray[np.float64]] = {}

    def compare(self, batch: dict[str, Tensor], name: str) -> list[tuple[int, ...]]:
        """Hold the samples of a batch that are among the chosen ones against the reference; returns the ids of the whole batch.

        Raises AssertionError naming loader, sample and what differs.
        """
        ids = [tuple(row) for row in batch["id"].tolist()]
        offsets = batch["q"].tolist() if "q" in batch else [0] * len(ids)
        for k, (ident, q) in enumerate(zip(ids, offsets, strict=True)):
            if ident in self.samples:
                for what, error in self._differences({part: batch[part][k] for part in ("frames", "mel", "va")}, ident, int(q)):
                    raise AssertionError(f"{name} delivers other {what} of sample {ident} at offset {q}: {error}")
        return ids

    def _differences(self, found: dict[str, Tensor], ident: tuple[int, ...], q: int) -> list[tuple[str, str]]:
        unit = self._units[self._manifest.units[ident[0]].name]
        assert unit.labels is not None
        wrong = []
        if not np.array_equal(found["va"].numpy(), label_rows(unit.labels, ident[1], ident[2], q), equal_nan=True):
            wrong.append(("labels", "not equal"))
        frames = self._frames([crop_path(unit.crops, int(frame)) for frame in strip_frames(ident[1], ident[2])[q : q + SUBSEQUENCE]])
        # rows 0 and 111 may take chroma from the neighbour in a strip (jmt_dist/data/strip.py)
        error = np.abs(found["frames"].numpy()[:, 1:-1] - frames[:, 1:-1]).max()
        if not error <= FRAME_TOLERANCE:
            wrong.append(("frames", f"off by {error:.2e}"))
        mel, wanted = found["mel"].numpy(), self._mel(ident, q)
        below = wanted.max((1, 2), keepdims=True) - wanted > NEAR_DB / MEL_STD
        error = (np.abs(mel - wanted) / np.where(below, MEL_FAR, MEL_NEAR)).max()
        if mel.shape != wanted.shape or not error <= 1:
            wrong.append(("spectrograms", f"{error:.2f} times the tolerance"))
        return wrong

    def _frames(self, paths: list[str]) -> NDArray[np.float64]:
        pixels = [np.asarray(Image.open(path).convert("RGB")) if path else np.zeros((SIZE, SIZE, 3), np.uint8) for path in paths]
        return (np.stack(pixels) - np.array(MEAN)) / np.array(STD)

    def _mel(self, ident: tuple[int, ...], q: int) -> NDArray[np.float64]:
        import librosa

        if (ident, q) not in self._mels:
            found = []
            for clip in clips_of(self.samples[ident], q).astype(np.float64) / 32768:
                power = librosa.feature.melspectrogram(
                    y=clip, sr=RATE, n_fft=N_FFT, win_length=HANN, hop_length=HOP, n_mels=MELS, htk=True, norm=None, pad_mode="reflect"
                )
                db = 10 * np.log10(np.maximum(power, 1e-10))
                found.append((np.maximum(db, db.max() - TOP_DB) - MEL_MEAN) / MEL_STD)
            self._mels[ident, q] = np.stack(found)
        return self._mels[ident, q]
