"""A tiny dataset tree made here, so that every pixel, label and sound is known to the test."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

RATE = 44_100
LABELS = "annotations/VA_Estimation_Challenge"


def picture(seed: int, size: int = 112) -> Image.Image:
    """A smooth coloured picture with some noise, another for every seed."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 255, (7, 7, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth).astype(np.float64) + rng.normal(0, 4, (size, size, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **settings: Any) -> bytes:
    """`image` as JPEG, by default as OpenCV and Pillow write it: 4:2:0, standard Huffman tables."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92, **settings})
    return buffer.getvalue()


def sound(seed: int, seconds: float) -> NDArray[np.int16]:
    """Noise, int16."""
    return np.random.default_rng(seed).integers(-9000, 9000, round(seconds * RATE)).astype(np.int16)


def write_video(path: Path, frames: int, fps: int, pcm: NDArray[np.int16] | None) -> None:
    """An AVI with PCM sound, so that what is read back is exactly `pcm`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=fps)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio: Any = container.add_stream("pcm_s16le", rate=RATE, layout="mono") if pcm is not None else None
        for k in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), k % 256, np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and pcm is not None:
            sent = 0
            for part in np.array_split(pcm, max(1, len(pcm) // 1024)):
                block = av.AudioFrame.from_ndarray(part[None], format="s16", layout="mono")
                block.sample_rate, block.pts = RATE, sent
                sent += len(part)
                container.mux(audio.encode(block))
            container.mux(audio.encode(None))


def labels(rows: int, seed: int) -> NDArray[np.float32]:
    """[rows, 2] in (-1, 1)."""
    return np.random.default_rng(seed).uniform(-0.99, 0.99, (rows, 2)).astype(np.float32)


def write_unit(root: Path, name: str, rows: int, seed: int, split: str = "Train_Set", fps: int = 30, crops: bool = True) -> None:
    """A unit with its own video: labels, crops and sound as the functions above give them for `seed`."""
    path = root / LABELS / split / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{np.format_float_positional(v)},{np.format_float_positional(a)}" for v, a in labels(rows, seed)]
    path.write_text("\n".join(["valence,arousal", *lines]) + "\n")
    write_video(root / "batch1" / f"{name}.avi", rows, fps, sound(seed, rows / fps))
    if crops:
        write_crops(root, name, rows, seed)


def write_crops(root: Path, name: str, rows: int, seed: int) -> None:
    """Crops 1..rows; only eight different pictures, since drawing them is what takes time."""
    folder = root / "cropped_aligned" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = [jpeg(picture(1000 * seed + k)) for k in range(8)]
    for frame in range(1, rows + 1):
        (folder / f"{frame:05d}.jpg").write_bytes(files[frame % 8])


def write_test_unit(root: Path, name: str, rows: int, seed: int) -> None:
    """A unit of the test list, with video and crops."""
    lists = root / "names_of_videos_in_each_test_set" / "Valence_Arousal_Estimation_Challenge_test_set_release.txt"
    sample = root / "test_set_examples" / "CVPR_6th_ABAW_VA_test_set_example.txt"
    for path, text in ((lists, f"{name}\n"), (sample, "".join(f"{name}/{i:05d}.jpg,0,0\n" for i in range(1, rows + 1)))):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text() if path.exists() else ("image_location,valence,arousal\n" if path == sample else "")
        path.write_text(before + text)
    write_video(root / "batch1" / f"{name}.avi", rows, 30, sound(seed, rows / 30))
    write_crops(root, name, rows, seed)


def write_tree(root: Path) -> Path:
    """Five training, two validation and one test unit: 8 videos, one of more than a segment, one at 25 fps."""
    for k, (name, rows, fps) in enumerate([("a1", 300, 30), ("b.2", 40, 25), ("video3", 61, 30), ("d4", 48, 30), ("e5", 33, 15)]):
        write_unit(root, name, rows, k + 1, fps=fps)
    write_unit(root, "v6", 50, 6, "Validation_Set")
    write_unit(root, "v7", 35, 7, "Validation_Set")
    write_test_unit(root, "t8", 45, 8)
    return root
