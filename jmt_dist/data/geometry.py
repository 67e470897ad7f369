"""Which source frames, clips and audio windows a sample holds: pure arithmetic (DESIGN section 4).

Source frames are numbered from 1, as the files are. N is a unit's number of label rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SEGMENT = 256  # source frames of a segment
PHASES = STEP = 4  # every 4th frame of a segment belongs to one phase
CLIPS = 8  # clips of a subsequence: the length L that GRU, transformers and fusion see
CLIP_FRAMES = 8  # frames of a clip
SUBSEQUENCE = CLIPS * CLIP_FRAMES  # frames of a subsequence
OFFSETS = 8  # places in a strip where a subsequence may start
LEAD = CLIP_FRAMES - 1  # frames before the first clip end
STRIP = SUBSEQUENCE + OFFSETS - 1  # frames of a strip
SIZE = 112  # side of a face crop in pixels
RATE = 44_100  # audio samples per second
WINDOW = 47_040  # audio samples of a clip: 32 frames at 30 fps
# Kinetics-400 statistics that torchvision's R(2+1)D weights were trained with, on the 0..255 scale
MEAN = [255 * value for value in (0.43216, 0.394666, 0.37645)]
STD = [255 * value for value in (0.22803, 0.22145, 0.216989)]
MEL_BINS, MEL_COLUMNS = 64, 107  # a clip's log-mel spectrogram

LABEL_BACK = {"end": 0, "middle": 3}  # frames of a clip, 4 source frames each, from its end back to the one whose label it has


def samples_of(rows: int) -> list[tuple[int, int]]:
    """All (segment m, phase p) of a unit of `rows` label rows: those with 256 m + 1 + p <= rows."""
    return [(m, p) for m in range(-(-rows // SEGMENT)) for p in range(PHASES) if SEGMENT * m + 1 + p <= rows]


def strip_frames(m: int, p: int) -> NDArray[np.int64]:
    """Source frames [71] of sample (m, p); values below 1 or above N have no picture and are black."""
    return SEGMENT * m + 1 + p + STEP * (np.arange(STRIP, dtype=np.int64) - LEAD)


def end_frames(m: int, p: int) -> NDArray[np.int64]:
    """Source frames [64] at which the clips n = q + 8 j of sample (m, p) end: strip frames 7 + n."""
    return strip_frames(m, p)[LEAD:]


def clip_end(m: int, p: int, q: int, j: int) -> int:
    """Source frame at which clip j of the subsequence at offset q of sample (m, p) ends."""
    return SEGMENT * m + 1 + p + STEP * (q + OFFSETS * j)
