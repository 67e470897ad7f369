"""One sample for the eye: what its members say, and a contact sheet of its strip and sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from jmt_dist.data.geometry import CLIP_FRAMES, LEAD, RATE, SIZE, STRIP, SUBSEQUENCE, WINDOW, end_frames, strip_frames
from jmt_dist.data.sample import Sample, decode_audio, parse_key
from jmt_dist.data.shards import Manifest
from jmt_dist.data.strip import MODES, decode
from jmt_dist.data.tars import Entry, parse_index, read_entry
from jmt_dist.errors import UserError

COLUMNS = CLIP_FRAMES  # a row of the sheet is one clip of subsequence 0, after a row of the lead-in
CAPTION, WAVE = 12, 120  # pixels: under each frame, and of the waveform


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
    """(tar, entry, sample) of a key. Raises UserError where no shard has it."""
    tar, entry = find_sample(manifest, key)
    with (manifest.folder / tar).open("rb") as file:
        return tar, entry, Sample.from_members(read_entry(file, entry))


def describe(manifest: Manifest, tar: str, entry: Entry, sample: Sample) -> list[str]:
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
    lines += ["", f"clips of subsequence 0 (of {SUBSEQUENCE} clip ends):   end frame   valence   arousal"]
    for n in range(0, SUBSEQUENCE, CLIP_FRAMES):
        lines.append(f"  clip {n // CLIP_FRAMES:<43}{end_frames(m, p)[n]:>10}{sample.va[n, 0]:>10.3f}{sample.va[n, 1]:>10.3f}")
    return lines


def contact_sheet(entry: Entry, sample: Sample) -> Image.Image:
    """All 71 frames with their source frame and labels, the lead-in first, and the waveform with the windows' ends."""
    _, m, p = parse_key(entry.key)
    strip = np.asarray(decode(sample.strip)).reshape(STRIP, SIZE, SIZE, 3)
    rows = 1 + SUBSEQUENCE // COLUMNS
    sheet = Image.new("RGB", (COLUMNS * SIZE, rows * (SIZE + CAPTION) + WAVE), "white")
    draw = ImageDraw.Draw(sheet)
    for k, frame in enumerate(strip_frames(m, p).tolist()):
        row, column = divmod(k + COLUMNS - LEAD, COLUMNS)  # the first clip end is alone at the end of the first row
        at = (column * SIZE, row * (SIZE + CAPTION))
        sheet.paste(Image.fromarray(strip[k]), at)
        label = "" if k < LEAD or np.isnan(sample.va[k - LEAD, 0]) else f"{sample.va[k - LEAD, 0]:+.2f} {sample.va[k - LEAD, 1]:+.2f}"
        draw.text((at[0] + 2, at[1] + SIZE), f"{frame}  {label}", fill="black" if sample.present[k] else "firebrick")
    _draw_wave(draw, sample, sheet.width, sheet.height - WAVE)
    return sheet


def _draw_wave(draw: ImageDraw.ImageDraw, sample: Sample, width: int, top: int) -> None:
    pcm = decode_audio(sample.audio, sample.kind).astype(np.float64) / 32768
    middle = top + WAVE // 2
    for x, part in enumerate(np.array_split(pcm, width)):
        draw.line((x, middle - part.max() * WAVE / 2, x, middle - part.min() * WAVE / 2), fill="steelblue")
    for end in sample.ends[:: len(sample.ends) // 8].tolist():
        x = end * (width - 1) / len(pcm)
        draw.line((x, top, x, top + WAVE), fill="firebrick")
    draw.line((WINDOW * (width - 1) / len(pcm), top, WINDOW * (width - 1) / len(pcm), top + WAVE), fill="black")


def write_sheet(sheet: Image.Image, path: Path) -> None:
    """Write the PNG. Raises UserError where it cannot be written."""
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}", "Give another out=.") from None
