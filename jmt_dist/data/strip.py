"""One vertical JPEG out of the 71 face crops of a sample, lossless where the sources allow (DESIGN section 6).

Mode 0: entropy-coded bytes copied and joined by restart markers. Mode 1: the same after re-spelling the
coefficients in the standard Huffman tables. Mode 2: decoded, put right, encoded at quality 95. Frames without a
picture are black. Decoders that interpolate chroma (libjpeg on 4:2:0) look one row across a frame's border: rows
0 and 111 of a frame may differ from the frame decoded alone, the rows between never do.

Damage inside a source's entropy-coded bytes that libjpeg itself puts up with is copied as it is: finding it would
take a full decode of every crop, and the restart markers keep it inside its frame.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from jmt_dist.data.geometry import SIZE
from jmt_dist.data.huffman import transcode
from jmt_dist.data.jpeg import (
    AC_CHROMA,
    AC_LUMA,
    DC_CHROMA,
    DC_LUMA,
    EOI,
    RESTART,
    Component,
    Header,
    Picture,
    StripError,
    black_entropy,
    header_bytes,
    header_size,
    parse,
)

MODES = ("restart markers", "coefficients", "re-encoded")
KNOWN_HEADERS = 1024  # kept, of 0.7 kB each
QUALITY = 95  # of mode 2, without chroma subsampling: about 45 dB
BLACK = Header(  # of a sample without any picture; every sampling and table would do
    SIZE,
    SIZE,
    (
        Component((2, 2), bytes([16] * 64), DC_LUMA, AC_LUMA),
        Component((1, 1), bytes([16] * 64), DC_CHROMA, AC_CHROMA),
        Component((1, 1), bytes([16] * 64), DC_CHROMA, AC_CHROMA),
    ),
    0,
    True,
)
_UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, EOFError, IndexError, Image.DecompressionBombError)  # PIL on bad files
_taken: set[bytes] = set()  # headers of strips that libjpeg has decoded


@dataclass(frozen=True)
class Strip:
    """`data` is the strip, `mode` 0..2; `unreadable` are the positions whose picture no decoder takes: black."""

    data: bytes
    mode: int
    present: tuple[bool, ...]
    unreadable: tuple[int, ...] = field(default=())


def join(pictures: Sequence[Picture | None]) -> bytes:
    """The strip of equal-format pictures, None = black, by restart markers: mode 0.

    Raises StripError where the formats differ, are not those of a 112x112 crop, or cannot spell black.
    """
    header = next((p.header for p in pictures if p is not None), BLACK)
    if not header.joinable or header.restart or (header.height, header.width) != (SIZE, SIZE):
        raise StripError(f"not a {SIZE}x{SIZE} YCbCr picture in a sampling that joins")
    parts = []
    for k, picture in enumerate(pictures):
        if picture is not None and picture.header != header:
            raise StripError("the tables of the frames differ")
        if k:
            parts.append(bytes((0xFF, 0xD0 + (k - 1) % 8)))
        parts.append(black_entropy(header) if picture is None else picture.entropy)
    head = header_bytes(replace(header, height=SIZE * len(pictures), restart=header.mcus))
    return b"".join([head, *parts, EOI])


def join_coefficients(pictures: Sequence[Picture | None]) -> bytes:
    """The strip of pictures whose Huffman tables or restart intervals differ: mode 1, still lossless.

    Raises StripError where size, sampling or quantisation differ, or a scan is not valid.
    """
    first = next((p.header for p in pictures if p is not None), BLACK)
    if not first.joinable:
        raise StripError("not YCbCr in a sampling that joins")
    if any(p is not None and not first.same_coefficients(p.header) for p in pictures):
        raise StripError("size, sampling or quantisation of the frames differ")
    header = first.with_standard_codes()
    return join([None if p is None else Picture(header, transcode(p)) for p in pictures])


def split(strip: bytes) -> list[bytes]:
    """The frames of a strip as stand-alone JPEGs: tables and coefficients of the sources (modes 0 and 1).

    Raises StripError where `strip` is not one.
    """
    picture, _ = parse(strip)
    header = picture.header
    across, (mcu_height, _) = header.mcus_across, header.mcu
    height = header.restart // across * mcu_height
    if not height or header.restart % across or header.height % height:
        raise StripError("the restart interval is not one frame")
    parts = RESTART.split(picture.entropy)
    order = [code[1] - 0xD0 for code in RESTART.findall(picture.entropy)]
    if len(parts) != header.height // height or order != [k % 8 for k in range(len(parts) - 1)]:
        raise StripError("restart markers are missing or out of order")
    head = header_bytes(replace(header, height=height, restart=0))
    return [head + part + EOI for part in parts]


def decode(data: bytes) -> Image.Image:
    """`data` as an RGB picture of any size. Raises StripError where no decoder takes it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except _UNREADABLE as error:
        raise StripError(f"cannot be decoded: {error}") from None


def fit(image: Image.Image) -> Image.Image:
    """The picture at 112x112."""
    return image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def encode(image: Image.Image) -> bytes:
    """An RGB picture, resized where its size differs, as JPEG of mode 2."""
    buffer = io.BytesIO()
    fit(image).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def _parse_all(sources: Sequence[bytes | None]) -> list[Picture | None]:
    head = b""
    pictures: list[Picture | None] = []
    for source in sources:
        if source is None:
            pictures.append(None)
            continue
        picture, head = parse(source, head)
        pictures.append(picture)
    return pictures


def _checked(strip: bytes) -> bytes:
    """`strip` once libjpeg has taken its header: a strip that no decoder takes would end a training run.

    Only headers make libjpeg refuse: it warns of whatever stands between restart markers and goes on (600 damaged strips tried, DALI's
    decoder too), and `parse` has seen to it that nothing there is a marker. So one strip of each header is decoded, not each (6 ms).
    """
    head = strip[: header_size(strip)]
    if head not in _taken:
        try:
            with Image.open(io.BytesIO(strip)) as image:
                image.draft("L", (image.width // 8, image.height // 8))
                image.load()
        except _UNREADABLE as error:
            raise StripError(f"the strip cannot be decoded: {error}") from None
        if len(_taken) >= KNOWN_HEADERS:  # optimised Huffman tables give every sample a header of its own
            _taken.clear()
        _taken.add(head)
    return strip


def make_strip(sources: Sequence[bytes | None]) -> Strip:
    """The strip of a sample from the bytes of its crops (None = no crop), in the lowest mode that works.

    Never fails for what is in a source: what cannot be decoded becomes black and is named in `unreadable`.
    """
    try:
        return Strip(_checked(join(_parse_all(sources))), 0, tuple(s is not None for s in sources))
    except StripError:
        pass  # the rare path: decode each, leave out what is broken, and try again from the top
    images: list[Image.Image | None] = []
    unreadable = []
    for k, source in enumerate(sources):
        try:
            images.append(None if source is None else decode(source))
        except StripError:
            images.append(None)
            unreadable.append(k)
    left = [None if image is None else source for source, image in zip(sources, images, strict=True)]
    present = tuple(s is not None for s in left)
    for mode, joiner in enumerate((join, join_coefficients)):
        try:
            return Strip(_checked(joiner(_parse_all(left))), mode, present, tuple(unreadable))
        except StripError:
            continue
    encoded = [None if image is None else encode(image) for image in images]
    return Strip(_checked(join(_parse_all(encoded))), 2, present, tuple(unreadable))
