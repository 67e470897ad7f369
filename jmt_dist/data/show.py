"""One sample for the eye: what its members say, and a contact sheet of its clips, spectrograms, labels and sound."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from jmt_dist.data.geometry import (
    CLIP_FRAMES,
    CLIPS,
    LEAD,
    MEL_COLUMNS,
    OFFSETS,
    RATE,
    SIZE,
    STRIP,
    SUBSEQUENCE,
    WINDOW,
    end_frames,
    strip_frames,
)
from jmt_dist.data.report import printable
from jmt_dist.data.sample import Sample, decode_audio, parse_key
from jmt_dist.data.shards import Manifest
from jmt_dist.data.sound import MEL_MEAN, MEL_STD, TOP_DB, spectrograms
from jmt_dist.data.strip import MODES, decode
from jmt_dist.data.tars import Entry, parse_index, read_entry
from jmt_dist.data.verify import check_sample
from jmt_dist.errors import UserError

# pixels: above the rows, left of the frames, between things, under a frame, of a spectrogram, of the charts of labels and sound
TOP, LEFT, GAP, CAPTION, MEL_WIDTH, CHART, WAVE = 30, 72, 8, 16, 2 * MEL_COLUMNS, 150, 90
BLUE, RED = "royalblue", "firebrick"
SCALE = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))  # quiet to loud, dark to bright
VERIFY = "verify_shards.py names all that is damaged."
SILENCE = -90.0  # dB: a clip whose peak is below is digital silence


def find_sample(manifest: Manifest, key: str) -> tuple[str, Entry]:
    """(tar, entry) of a key, of the first sample where it is empty. Raises UserError where no shard has it."""
    if key:
        try:
            unit, _, _ = parse_key(key)
        except ValueError as error:
            raise UserError(str(error), "Keys are such as video59_right-0003-2.") from None
        if unit not in {u.name for u in manifest.units}:
            raise UserError(f"there is no unit {unit} in {manifest.folder}", "manifest.json lists the units.")
    for shard in manifest.shards:
        for entry in parse_index((manifest.folder / shard.index).read_text(encoding="ascii")):
            if key in ("", entry.key):
                return shard.name, entry
    raise UserError(f"there is no sample {key} in {manifest.folder}", "Segments count from 0 in steps of 256 rows, phases from 0 to 3.")


def load_sample(manifest: Manifest, key: str) -> tuple[str, Entry, Sample]:
    """(tar, entry, sample) of a key. Raises UserError where no shard has it, and where it cannot be read or is not as promised."""
    units = {unit.name: (index, unit) for index, unit in enumerate(manifest.units)}
    try:
        tar, entry = find_sample(manifest, key)
        with (manifest.folder / tar).open("rb") as file:
            members = read_entry(file, entry)
    except (OSError, ValueError) as error:
        raise UserError(f"{manifest.folder} cannot be read: {error}", VERIFY) from None
    for problem in check_sample(entry, members, units, str(manifest.options.get("audio"))):
        raise UserError(f"{entry.key} in {manifest.folder / tar} is damaged: {problem}", VERIFY)
    return tar, entry, Sample.from_members(members)


def describe(manifest: Manifest, tar: str, entry: Entry, sample: Sample, offset: int = OFFSETS - 1) -> list[str]:
    """What the members say, line by line."""
    _, m, p = parse_key(entry.key)
    unit = manifest.units[int(sample.id[0])]
    frames = strip_frames(m, p)
    lines = [f"{entry.key} in {tar}", f"unit {unit.name} (index {sample.id[0]}, {unit.split}, video {unit.video}, {unit.rows:,} rows)"]
    lines += [f"segment {m}, phase {p}, strip mode {sample.id[3]} ({MODES[int(sample.id[3])]})", "", "member            bytes"]
    lines += [f"{extension:<12}{size:>11,}" for extension, _, size in entry.members]
    seconds = len(decode_audio(sample.audio, sample.kind)) / RATE
    step = np.diff(sample.ends).mean() / RATE
    lines += ["", f"{STRIP} strip frames: source frames {frames[0]} to {frames[-1]}, {int(sample.present.sum())} present"]
    lines += [f"{seconds:.2f} s of sound; clip ends every {1000 * step:.1f} ms; the first window ends at {sample.ends[0] / RATE:.3f} s"]
    lines += ["", f"clips of the subsequence at offset {offset}:               end frame   valence   arousal"]
    for n in range(offset, SUBSEQUENCE, CLIP_FRAMES):
        lines.append(f"  clip {n // CLIP_FRAMES:<43}{end_frames(m, p)[n]:>10}{sample.va[n, 0]:>10.3f}{sample.va[n, 1]:>10.3f}")
    return lines


def log_mel(window: NDArray[np.int16]) -> NDArray[np.float64]:
    """The log-mel spectrogram in dB [64, 107] of a clip's sound [47040], as the loader's (DESIGN section 7) before normalisation."""
    normalised = spectrograms([torch.from_numpy(window)], torch.tensor([[WINDOW]]))[0, 0]
    return normalised.double().numpy() * MEL_STD + MEL_MEAN


def contact_sheet(entry: Entry, sample: Sample, offset: int = OFFSETS - 1) -> Image.Image:
    """The subsequence at `offset`: a row for each clip with its frames, spectrogram and label; below, labels and sound over time."""
    unit, m, p = parse_key(entry.key)
    strip = np.asarray(decode(sample.strip)).reshape(STRIP, SIZE, SIZE, 3)
    audio = decode_audio(sample.audio, sample.kind)
    sheet = Image.new("RGB", (LEFT + CLIP_FRAMES * SIZE + GAP + MEL_WIDTH + GAP, TOP + CLIPS * (SIZE + CAPTION) + CHART + WAVE), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    draw.text((GAP, 6), f"{printable(unit)}, segment {m}, phase {p}, offset {offset}", fill="black", font=ImageFont.load_default(size=15))
    draw.text((LEFT + CLIP_FRAMES * SIZE + GAP, 8), f"log-mel, {TOP_DB:.0f} dB, 0 to {RATE // 2000} kHz", fill="dimgray", font=font)
    frames = strip_frames(m, p)
    for j in range(CLIPS):
        n, y = offset + j * CLIP_FRAMES, TOP + j * (SIZE + CAPTION)
        for k in range(CLIP_FRAMES):
            x = LEFT + k * SIZE
            sheet.paste(Image.fromarray(strip[n + k]), (x, y))
            there = bool(sample.present[n + k])
            draw.text((x + 2, y + SIZE), f"{frames[n + k]}{'' if there else ' black'}", fill="dimgray" if there else RED, font=font)
        window = audio[sample.ends[n] - WINDOW : sample.ends[n]]
        sheet.paste(_picture(log_mel(window)), (LEFT + CLIP_FRAMES * SIZE + GAP, y))
        none = bool(np.isnan(sample.va[n]).any())
        label = "no label" if none else f"V {sample.va[n, 0]:+.2f}\nA {sample.va[n, 1]:+.2f}"
        draw.multiline_text((GAP, y + 4), f"clip {j}\nends {frames[LEAD + n]}\n{label}", fill="black", font=font, spacing=6)
    top = TOP + CLIPS * (SIZE + CAPTION)
    ends = sample.ends[offset::CLIP_FRAMES]
    _draw_labels(draw, sample, len(audio), ends, sheet.width, top)
    _draw_wave(draw, audio, ends, sheet.width, top + CHART)
    return sheet


def _picture(decibels: NDArray[np.float64]) -> Image.Image:
    """A spectrogram in colours, low frequencies at the bottom, as high as a frame; silence is dark."""
    level = (decibels - decibels.max()) / TOP_DB + 1 if decibels.max() > SILENCE else np.zeros_like(decibels)
    colours = np.stack([np.interp(level[::-1], np.linspace(0, 1, len(SCALE)), column) for column in zip(*SCALE, strict=True)], axis=-1)
    return Image.fromarray(colours.astype(np.uint8)).resize((MEL_WIDTH, SIZE), Image.Resampling.NEAREST)


def _at(sample: int, length: int, width: int) -> float:
    """Where in a chart `width` wide a sample of the sound lies: both charts share this axis."""
    return LEFT + sample * (width - LEFT - GAP) / length


def _draw_labels(draw: ImageDraw.ImageDraw, sample: Sample, length: int, ends: NDArray[np.int32], width: int, top: int) -> None:
    """Valence and arousal at all 64 clip ends over time, from -1 to 1; a line is broken where a label is missing."""
    font, half = ImageFont.load_default(size=12), (CHART - 2 * GAP) / 2
    middle = top + CHART / 2
    for value in (-1, 0, 1):
        y = middle - value * half
        draw.line((LEFT, y, width - GAP, y), fill="lightgray")
        draw.text((LEFT - 22, y - 7), f"{value:+d}" if value else " 0", fill="dimgray", font=font)
    for end in ends.tolist():
        draw.line((_at(end, length, width), top + GAP, _at(end, length, width), top + CHART - GAP), fill="gainsboro")
    for column, (name, colour) in enumerate((("valence", BLUE), ("arousal", RED))):
        draw.text((GAP, middle - 42 + 66 * column), name, fill=colour, font=font)
        points = [(_at(int(end), length, width), middle - float(va[column]) * half) for end, va in zip(sample.ends, sample.va, strict=True)]
        for before, point in pairwise(points):
            if not np.isnan(before[1] + point[1]):
                draw.line((*before, *point), fill=colour, width=2)
        for x, y in points:
            if not np.isnan(y):
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)


def _draw_wave(draw: ImageDraw.ImageDraw, audio: NDArray[np.int16], ends: NDArray[np.int32], width: int, top: int) -> None:
    """All the sound of the sample, as loud as its loudest, and where the windows of the clips end."""
    font, columns = ImageFont.load_default(size=12), width - LEFT - GAP
    draw.text((GAP, top + WAVE / 2 - 24), f"sound\n{len(audio) / RATE:.1f} s\n{'' if audio.any() else 'silent'}", fill="dimgray", font=font)
    middle, scale = top + WAVE / 2, (WAVE / 2 - 4) / max(1, int(np.abs(audio.astype(np.int32)).max()))
    for x, part in enumerate(np.array_split(audio, columns)):
        draw.line((LEFT + x, middle - part.max() * scale, LEFT + x, middle - part.min() * scale), fill="steelblue")
    for end in ends.tolist():
        draw.line((_at(end, len(audio), width), top, _at(end, len(audio), width), top + WAVE), fill="gray")


def write_sheet(sheet: Image.Image, path: Path) -> None:
    """Write the PNG. Raises UserError where it cannot be written."""
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}", "Give another out=.") from None
