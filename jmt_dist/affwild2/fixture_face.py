"""Rendered faces of the fixture: 112x112 crops of drawn people, valence in mouth, brows and cheeks.

Everything is drawn with soft-edged masks in face coordinates: x to the right, y down, the crop spans
[-1, 1] in both, 0.1 is 5.6 pixels. Arrays of a block of frames are [F, H, W], colours are RGB in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from jmt_dist.affwild2.fixture_walk import Array, drift, stream

Image = NDArray[Any]  # float32 on the way to the canvas; a mask may be float64

SIZE = 112
BLOCK = 8  # frames drawn together: small enough to stay in the cache
_SOFT = 0.035  # width of an edge
_SKINS = ((0.97, 0.83, 0.74), (0.91, 0.72, 0.58), (0.80, 0.58, 0.42), (0.62, 0.43, 0.30), (0.48, 0.33, 0.24))
_HAIRS = ((0.08, 0.06, 0.05), (0.25, 0.15, 0.08), (0.45, 0.28, 0.14), (0.78, 0.62, 0.35), (0.62, 0.60, 0.58), (0.55, 0.22, 0.10))
_IRISES = ((0.20, 0.12, 0.07), (0.30, 0.45, 0.62), (0.30, 0.42, 0.25), (0.35, 0.25, 0.15))


@dataclass(frozen=True)
class Identity:
    """How one person and their surroundings look; lengths in face coordinates."""

    skin: Image
    hair: Image
    iris: Image
    lips: Image
    cloth: Image
    background: Image  # [3, H, W]
    width: float
    height: float
    fringe: float  # how far the hair comes down the forehead
    volume: float  # of the hair around the head; 0 = bald
    length: float  # how far down the hair falls at the sides
    beard: float
    glasses: bool
    eye_gap: float
    eye_size: float
    eye_rest: float
    brow_rest: float
    brow_thick: float
    mouth_y: float
    mouth_width: float
    mouth_rest: float
    lip: float
    nose: float
    light: tuple[float, float, float]  # direction x, y and strength
    cast: Image  # colour of the light
    pose: tuple[float, float, float, float]  # mean shift x, y, roll, yaw
    scale: float


def _background(rng: np.random.Generator) -> Image:
    low = rng.random((1, 5, 5)) * 0.25 + rng.random((3, 5, 5)) * 0.1 + rng.random((3, 1, 1)) * 0.2 + rng.random() * 0.3
    fine = gaussian_filter(rng.standard_normal((SIZE, SIZE)), rng.uniform(1, 6)) * rng.uniform(0, 0.4)
    smooth = np.stack([zoom(channel, SIZE / 5, order=1) for channel in low])
    return np.clip(0.45 + 0.5 * (smooth + fine - 0.45), 0, 1).astype(np.float32)  # a wall, not a poster


def make_identity(seed: int, identity: int) -> Identity:
    """Person number `identity`; skin tones run evenly through the numbers, everything else is drawn at random."""
    rng = stream(seed, "identity", identity)
    tone = (0.31 + identity * 0.6180339887) % 1.0 * (len(_SKINS) - 1)
    low = int(tone)
    skin = np.array(_SKINS[low]) * (1 - tone + low) + np.array(_SKINS[min(low + 1, len(_SKINS) - 1)]) * (tone - low)
    lips = skin * np.array([0.92, 0.48, 0.50]) * rng.uniform(0.75, 0.95) + np.array([rng.uniform(0, 0.1), 0, 0.02])
    angle, style = rng.uniform(0, 2 * np.pi), rng.random()
    return Identity(
        skin=np.clip(skin + rng.normal(0, 0.02, 3), 0.1, 1).astype(np.float32),
        hair=np.array(_HAIRS[rng.integers(len(_HAIRS))], np.float32) * np.float32(rng.uniform(0.8, 1.2)),
        iris=np.array(_IRISES[rng.integers(len(_IRISES))], np.float32),
        lips=lips.astype(np.float32),
        cloth=rng.uniform(0.05, 0.95, 3).astype(np.float32),
        background=_background(rng),
        width=rng.uniform(0.69, 0.77),
        height=rng.uniform(0.92, 1.04),
        fringe=rng.uniform(-0.05, 0.10),
        volume=0.0 if style < 0.12 else rng.uniform(0.06, 0.18),
        length=rng.uniform(-0.2, 0.2) if style < 0.6 else rng.uniform(0.5, 1.4),
        beard=rng.uniform(0.2, 0.45) if rng.random() < 0.25 else 0.0,
        glasses=bool(rng.random() < 0.25),
        eye_gap=rng.uniform(0.32, 0.37),
        eye_size=rng.uniform(0.14, 0.175),
        eye_rest=rng.normal(0, 0.07),
        brow_rest=rng.normal(0, 0.01),
        brow_thick=rng.uniform(0.03, 0.05),
        mouth_y=rng.uniform(0.465, 0.505),
        mouth_width=rng.uniform(0.35, 0.40),
        mouth_rest=rng.normal(0, 0.01),
        lip=rng.uniform(0.04, 0.065),
        nose=rng.uniform(0.10, 0.16),
        light=(float(np.cos(angle)), float(np.sin(angle)), rng.uniform(0.0, 0.18)),
        cast=(rng.uniform(0.88, 1.06) * rng.uniform(0.95, 1.05, 3)).astype(np.float32),
        pose=(rng.normal(0, 0.02), rng.normal(0, 0.02), rng.normal(0, 0.03), rng.normal(0, 0.18)),
        scale=rng.uniform(1.13, 1.21),
    )


@dataclass(frozen=True)
class Motion:
    """Per frame [N]: pose, blinking and talking, none of which depends on valence or arousal but for its size."""

    x: Array
    y: Array
    roll: Array
    yaw: Array
    lid: Array
    talk: Array
    light: Array


def make_motion(rng: np.random.Generator, who: Identity, times: Array, arousal: Array) -> Motion:
    """Head motion grows with the arousal cue [N] (a side cue); talking and blinking do not."""
    lively = 2.0 ** (0.7 * arousal)
    sway = [drift(rng, times, 0.35) for _ in range(4)]
    x, y, roll, yaw = (mean + size * lively * s for mean, size, s in zip(who.pose, (0.018, 0.018, 0.025, 0.10), sway, strict=True))
    lid = np.zeros_like(times)
    for blink in np.cumsum(rng.uniform(1.5, 6.0, 2 + int(times[-1] / 1.5))):
        lid = np.maximum(lid, np.exp(-(((times - blink) / 0.07) ** 2)))
    talk = np.clip(drift(rng, times, 0.08), 0, 2) * (drift(rng, times, 1.0) > -0.3)
    return Motion(x, y, roll, yaw, lid, talk, 1 + 0.04 * drift(rng, times, 1.5))


class _Canvas:
    """A block of frames being drawn: `rgb` [F, 3, H, W] and face coordinates `x`, `y` [F, H, W]."""

    def __init__(self, background: Image, x: Image, y: Image) -> None:
        self.x, self.y = x, y
        self.rgb = np.repeat(background[None], len(x), 0)

    def window(self, top: float, bottom: float, left: float, right: float) -> tuple[slice, slice]:
        """The pixels that may hold what lies in a box of face coordinates, with room for pose."""
        t, b, le, r = (round((v + 1) * SIZE / 2) for v in (top - 0.28, bottom + 0.28, left - 0.34, right + 0.34))
        return slice(max(t, 0), min(b, SIZE)), slice(max(le, 0), min(r, SIZE))

    def paint(self, where: tuple[slice, slice], mask: Image, colour: Image) -> None:
        """Lay `colour` [3] or [F, 3, h, w] over the window with opacity `mask` [F, h, w]."""
        part = self.rgb[:, :, where[0], where[1]]
        part += mask[:, None] * ((colour[None, :, None, None] if colour.ndim == 1 else colour) - part)


def _inside(distance: Image, soft: float = _SOFT) -> Image:
    return np.clip(0.5 - distance / np.float32(soft), 0, 1)


def _ellipse(x: Image, y: Image, a: float | Image, b: float | Image, soft: float = _SOFT) -> Image:
    return _inside((np.sqrt((x / a) ** 2 + (y / b) ** 2) - 1) * np.minimum(a, b), soft)


def _column(values: Array) -> Image:
    return values.astype(np.float32)[:, None, None]


_WHOLE = (slice(0, SIZE), slice(0, SIZE))


def _head(c: _Canvas, who: Identity, inner: Image, e: Image) -> None:
    x, y = c.x, c.y
    c.paint(_WHOLE, _inside(np.abs(x) - 0.42 - 0.5 * np.clip(y - 0.95, 0, 1)) * (y > 0.5), who.skin * np.float32(0.72))
    c.paint(_WHOLE, _inside(1.02 - y + 0.25 * x * x, 0.06), who.cloth)
    if who.volume:
        wide, high = who.width + who.volume, who.height + who.volume
        hair = np.maximum(_ellipse(x, y + 0.1, wide, high), _inside(np.abs(x) - wide * 0.97) * (y > 0)) * _inside(y - who.length, 0.1)
        c.paint(_WHOLE, hair, who.hair)
    # skin, darker towards the rim and away from the light
    rim = (inner / np.float32(who.width)) ** 2 * np.float32(0.22) + np.clip(y, 0, 2) ** 2 * np.float32(0.10)
    shade = 1 - rim + np.float32(who.light[2]) * (who.light[0] * x + who.light[1] * y)
    flush = 1 + np.clip(e, -1.7, 1.7) * np.array([0.05, -0.01, -0.03], np.float32)[:, None, None]  # [F, 3, 1, 1]
    jaw = np.float32(who.width) * (1 - np.float32(0.22) * np.clip(y, 0, 1) ** 2)
    c.paint(_WHOLE, _ellipse(x, y, jaw, who.height), who.skin[None, :, None, None] * shade[:, None] * flush)
    if who.volume:
        line = -0.62 + who.fringe + 0.10 * np.cos(inner * 4) - 0.25 * inner**2
        top = _inside(y - line, 0.08) * _ellipse(x, y + 0.05, who.width + who.volume * 0.8, who.height + who.volume * 0.8)
        c.paint(_WHOLE, top, who.hair * np.float32(0.9))
    if who.beard:
        chin = _inside(0.42 - 0.3 * inner**2 - y, 0.35) * _ellipse(x, y, jaw * 0.97, who.height * 0.97)
        c.paint(_WHOLE, np.maximum(chin, _ellipse(inner, y - 0.35, 0.26, 0.075, 0.08)) * np.float32(who.beard), who.hair)


def _nose_and_cheeks(c: _Canvas, who: Identity, xf: Image, e: Image) -> None:
    w = c.window(-0.2, 0.5, -0.7, 0.7)
    x, y = xf[:, w[0], w[1]], c.y[:, w[0], w[1]]
    smile, sulk = np.clip(e, 0, 2), np.clip(-e, 0, 2)
    ax = np.abs(x)
    cheek = np.exp(-(((ax - 0.42) / 0.17) ** 2) - ((y - 0.22 + 0.05 * smile) / 0.13) ** 2)
    c.paint(w, cheek * np.clip(0.05 + 0.40 * smile, 0, 0.75), np.clip(who.skin * np.array([1.15, 0.78, 0.76], np.float32), 0, 1))
    # the fold from nose to mouth corner deepens with a smile, the pouch below the eye with its opposite
    fold = _inside(np.abs(ax - 0.17 - 0.42 * (y - 0.1)) - 0.012, 0.05) * _inside(np.abs(y - 0.27) - 0.13, 0.1)
    c.paint(w, fold * np.clip(0.15 + 0.35 * smile, 0, 0.7), who.skin * np.float32(0.62))
    side = np.float32(-np.sign(who.light[0]))
    c.paint(w, _inside(np.abs(x - side * 0.07) - 0.02, 0.07) * _inside(np.abs(y + 0.02) - 0.17, 0.1) * 0.35, who.skin * np.float32(0.66))
    nostril = _ellipse(ax - np.float32(who.nose * 0.55), y - 0.23 + 0.01 * sulk, 0.045, 0.028)
    wing = _ellipse(x, y - 0.225, who.nose, 0.055, 0.06)
    c.paint(w, wing * 0.35, who.skin * np.float32(0.75))
    c.paint(w, nostril * 0.8, who.skin * np.float32(0.30))


def _eyes(c: _Canvas, who: Identity, xf: Image, e: Image, arousal: Image, lid: Image, gaze: Image) -> None:
    w = c.window(-0.42, 0.05, -0.62, 0.62)
    x, y = xf[:, w[0], w[1]], c.y[:, w[0], w[1]]
    side = np.sign(x)
    ex, ey = np.abs(x) - np.float32(who.eye_gap), y + 0.15
    smile, sulk = np.clip(e, 0, 2), np.clip(-e, 0, 2)
    opening = np.clip(0.095 * (1 + who.eye_rest) + 0.038 * arousal, 0.02, 0.22) * (1 - 0.92 * lid)
    size = who.eye_size
    lower = np.clip(opening - 0.022 * smile, 0.008, 1)
    half = np.where(ey < 0, opening, lower)
    eye = _ellipse(ex, ey, size, half, 0.03)
    c.paint(w, _ellipse(ex, ey + 0.01, size * 1.25, half + 0.06, 0.08) * 0.30, who.skin * np.float32(0.60))
    c.paint(w, eye, np.array([0.93, 0.92, 0.90], np.float32))
    iris = eye * _ellipse(ex - gaze * side, ey, 0.072, 0.072, 0.03)
    c.paint(w, iris, who.iris)
    c.paint(w, eye * _ellipse(ex - gaze * side, ey, 0.034, 0.034, 0.03), np.array([0.03, 0.03, 0.03], np.float32))
    rim = _inside(np.abs(ey + half * np.sqrt(np.clip(1 - (ex / size) ** 2, 0, 1))) - 0.013, 0.03) * _inside(np.abs(ex) - size)
    c.paint(w, rim * (ey < 0.02) * 0.85, who.hair * np.float32(0.35))
    if who.glasses:
        ring = np.abs(np.sqrt((ex / 0.23) ** 2 + (ey / 0.19) ** 2) - 1) * 0.2 - 0.012
        frame = np.maximum(_inside(ring), _inside(np.abs(y + 0.17) - 0.014) * (np.abs(x) < 0.13))
        c.paint(w, frame * 0.9, np.array([0.1, 0.09, 0.09], np.float32))
    furrow = np.exp(-((x / 0.42) ** 2) - ((y + 0.30) / 0.12) ** 2) * np.clip(0.5 * sulk, 0, 0.7)
    c.paint(w, furrow, who.skin * np.float32(0.5))
    # brows: the inner ends come down and together for low valence, the whole brow rises for high
    bx = (np.abs(x) - np.float32(who.eye_gap) + 0.05 * np.clip(sulk, 0, 1.2)) / 0.21
    tilt = 0.10 * sulk * np.clip(0.4 - bx, 0, 1.4) - 0.03 * smile
    line = -0.38 + who.brow_rest - 0.03 * arousal + tilt + 0.05 * bx**2
    brow = _inside(np.abs(y - line) - np.float32(who.brow_thick) * (1.15 - 0.35 * bx), 0.035) * _inside(np.abs(bx) - 1, 0.2)
    c.paint(w, brow * 0.9, who.hair * np.float32(0.55))


def _mouth(c: _Canvas, who: Identity, xf: Image, e: Image, talk: Image) -> None:
    w = c.window(0.2, 0.95, -0.5, 0.5)
    x, y = xf[:, w[0], w[1]], c.y[:, w[0], w[1]]
    smile, sulk = np.clip(e, 0, 2), np.clip(-e, 0, 2)
    width = np.float32(who.mouth_width) + 0.075 * np.clip(e, -1, 1.7)
    s = x / width
    arch = np.clip(1 - s * s, 0, 1)
    curve = 0.215 * e + np.float32(who.mouth_rest)
    middle = np.float32(who.mouth_y) + 0.045 * sulk + curve * (0.42 - np.clip(s * s, 0, 1.6))
    gap = 0.014 + 0.12 * np.clip(smile, 0, 1.5) + 0.025 * talk
    upper, lower = middle - 0.35 * gap * arch, middle + gap * arch
    ends = _inside((np.abs(s) - 1) * width, 0.05)
    lip = np.float32(who.lip)
    lips = _inside(np.maximum(upper - lip * np.sqrt(arch) - y, y - lower - 1.25 * lip * np.sqrt(arch))) * ends
    shadow = _inside(np.abs(y - lower - 1.25 * lip - 0.06) - 0.02, 0.08) * _inside(np.abs(s) - 0.6, 0.3)
    c.paint(w, shadow * (0.15 + 0.2 * np.clip(sulk, 0, 1)), who.skin * np.float32(0.6))
    c.paint(w, lips * np.clip(6 * arch, 0, 0.95), who.lips)
    hole = _inside(np.maximum(upper - y, y - lower), 0.03) * ends
    c.paint(w, hole, np.array([0.16, 0.05, 0.06], np.float32))
    teeth = hole * _inside(y - upper - 0.6 * gap * arch, 0.03) * np.clip(3 * smile, 0, 1)
    c.paint(w, teeth * 0.95, np.array([0.95, 0.94, 0.90], np.float32))
    corner = np.exp(-((np.abs(x) - width - 0.01) ** 2 + (y - middle) ** 2) / 0.0016)
    c.paint(w, corner * 0.55, who.skin * np.float32(0.45))


def render_blocks(seed: int, name: str, who: Identity, times: Array, cues: Array) -> Iterator[NDArray[np.uint8]]:
    """Crops of unit `name` at all its frames' `times` [N], for face cues [N, 2], in blocks [<= 8, 112, 112, 3]."""
    rng = stream(seed, name, "face")
    motion = make_motion(rng, who, times, cues[:, 1])
    gaze = 0.02 * drift(rng, times, 0.4)
    grain = (rng.uniform(0.006, 0.02) * rng.standard_normal((3, 2 * SIZE, 2 * SIZE))).astype(np.float32)
    shift = rng.integers(0, SIZE, (len(times), 2))
    axis = ((np.arange(SIZE) - (SIZE - 1) / 2) * 2 / SIZE).astype(np.float32)
    for start in range(0, len(times), BLOCK):
        f = slice(start, start + BLOCK)
        cos, sin = (_column(g(motion.roll[f]) / who.scale) for g in (np.cos, np.sin))
        px, py = axis[None, None, :] - _column(motion.x[f]), axis[None, :, None] - _column(motion.y[f])
        c = _Canvas(who.background, cos * px + sin * py, cos * py - sin * px)
        xf = (c.x - 0.13 * _column(motion.yaw[f])) * (1 + 0.12 * _column(motion.yaw[f] ** 2))  # turning moves the features, not the outline
        e, arousal = _column(cues[f, 0]), _column(cues[f, 1])
        _head(c, who, xf, e[:, None])
        _nose_and_cheeks(c, who, xf, e)
        _eyes(c, who, xf, e, arousal, _column(motion.lid[f]), _column(gaze[f]))
        _mouth(c, who, xf, e, _column(motion.talk[f]))
        c.rgb *= who.cast[None, :, None, None] * motion.light[f].astype(np.float32)[:, None, None, None]
        for k, (top, left) in enumerate(shift[f]):
            c.rgb[k] += grain[:, top : top + SIZE, left : left + SIZE]
        yield (np.clip(c.rgb, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)
