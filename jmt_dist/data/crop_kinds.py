"""What is odd about face crops, for the packing report: told from their headers, without decoding."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

from PIL import Image

from jmt_dist.data.geometry import LEAD, SIZE
from jmt_dist.data.jpeg import Header, StripError, header_size, parse, parse_header

SIZES, PROGRESSIVE, GRAY = "crops of another size", "progressive crops", "grayscale crops"
FOREIGN, SAMPLING = "crops of another colour space or format", "crops without 4:2:0 sampling"
QUANTISATION, HUFFMAN = "crops of other quantisation", "crops with Huffman tables of their own"


def count_kinds(sources: Sequence[bytes | None], strip: bytes, mode: int) -> Counter[str]:
    """Frames by kind among a sample's `sources` (None = black), whose strip has this `mode`.

    The lead-in is not counted: its frames are counted in the sample before. One frame may be of several kinds.
    """
    own = [source for source in sources[LEAD:] if source is not None]
    if mode == 0:  # all share one header, the strip's but for its height and restart interval
        return Counter(dict.fromkeys(_kinds_of_header(parse_header(strip[: header_size(strip)])), len(own)) if own else {})
    found: Counter[str] = Counter()
    tables: Counter[bytes] = Counter()
    for source in own:
        kinds, quantisation = _kinds(source)
        found.update(kinds)
        tables[quantisation] += 1
    if mode == 2 and len(tables) > 1:
        found[QUANTISATION] += sum(tables.values()) - max(tables.values())
    return +found


def _kinds_of_header(header: Header) -> list[str]:
    standard = header.with_standard_codes()
    kinds = [SAMPLING] * (header.components[0].sampling != (2, 2))
    return kinds + [HUFFMAN] * any((a.dc, a.ac) != (b.dc, b.ac) for a, b in zip(header.components, standard.components, strict=True))


def _kinds(source: bytes) -> tuple[list[str], bytes]:
    """Kinds of one crop and its quantisation of luma."""
    try:
        header = parse(source)[0].header
    except StripError:
        header = None
    if header is not None and header.joinable:
        kinds = _kinds_of_header(header) + [SIZES] * ((header.height, header.width) != (SIZE, SIZE))
        return kinds, header.components[0].quantisation
    try:
        with Image.open(io.BytesIO(source)) as image:
            tables: dict[int, list[int]] = getattr(image, "quantization", {})
            kinds = [SIZES] * (image.size != (SIZE, SIZE)) + [PROGRESSIVE] * bool(image.info.get("progressive"))
            kinds += [GRAY] * (image.mode == "L") + [FOREIGN] * (image.mode not in ("L", "RGB") or image.format != "JPEG")
            if not kinds:
                kinds = [SAMPLING if header is not None else FOREIGN]
            return kinds, bytes(value & 255 for value in tables.get(0, []))
    except (OSError, ValueError, SyntaxError):
        return [FOREIGN], b""
