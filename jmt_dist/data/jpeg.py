"""Baseline JPEG as a strip needs it: a checked header, the entropy-coded bytes, a black frame (ITU-T T.81).

Nothing is decoded here: headers are read and written, and a black frame is spelled in the Huffman codes
of the frames it stands among.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from functools import lru_cache

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
JFIF = bytes.fromhex("ffe000104a46494600010100000100010000")
MARKER = re.compile(rb"\xff[^\x00]", re.DOTALL)  # in entropy-coded data FF is followed by 00, or begins a marker
RESTART = re.compile(rb"\xff[\xd0-\xd7]")
SAMPLINGS = ((1, 1), (2, 1), (1, 2), (2, 2))  # of luma, chroma being (1, 1): all that divide 112 rows and nvJPEG decodes

# T.81, tables K.3 to K.6: 16 counts of codes by length, then the symbols
DC_LUMA = bytes.fromhex("00010501010101010100000000000000000102030405060708090a0b")
DC_CHROMA = bytes.fromhex("00030101010101010101010000000000000102030405060708090a0b")
AC_LUMA = bytes.fromhex(
    "0002010303020403050504040000017d01020300041105122131410613516107227114328191a1082342b1c11552d1f02433627282090a161718191a25"
    "262728292a3435363738393a434445464748494a535455565758595a636465666768696a737475767778797a838485868788898a92939495969798999a"
    "a2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa"
)
AC_CHROMA = bytes.fromhex(
    "00020102040403040705040400010277000102031104052131061241510761711322328108144291a1b1c109233352f0156272d10a162434e125f11718"
    "191a262728292a35363738393a434445464748494a535455565758595a636465666768696a737475767778797a82838485868788898a92939495969798"
    "999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa"
)


class StripError(ValueError):
    """These bytes are no JPEG of the kind asked for, or do not join with the others."""


@dataclass(frozen=True)
class Component:
    """One colour component: (horizontal, vertical) sampling and its tables as T.81 writes them."""

    sampling: tuple[int, int]
    quantisation: bytes  # 64 values in zigzag order
    dc: bytes  # 16 counts and symbols
    ac: bytes


@dataclass(frozen=True)
class Header:
    """What decides the meaning of entropy-coded bytes. `restart` is in MCUs, 0 = no restart markers."""

    height: int
    width: int
    components: tuple[Component, ...]
    restart: int
    ycc: bool

    @property
    def joinable(self) -> bool:
        """YCbCr in one of the samplings a strip may have."""
        return self.ycc and self.components[0].sampling in SAMPLINGS and all(c.sampling == (1, 1) for c in self.components[1:])

    @property
    def mcu(self) -> tuple[int, int]:
        """(height, width) of an MCU in pixels."""
        h, v = self.components[0].sampling
        return 8 * v, 8 * h

    @property
    def mcus_across(self) -> int:
        """MCUs in a row of MCUs."""
        return -(-self.width // self.mcu[1])

    @property
    def mcus(self) -> int:
        """MCUs in the picture."""
        return -(-self.height // self.mcu[0]) * self.mcus_across

    def same_coefficients(self, other: Header) -> bool:
        """Whether DCT coefficients mean the same under both headers: size, sampling and quantisation agree."""
        mine, theirs = ([(c.sampling, c.quantisation) for c in h.components] for h in (self, other))
        return mine == theirs and (self.height, self.width, self.ycc) == (other.height, other.width, other.ycc)

    def with_standard_codes(self) -> Header:
        """The same picture format with the Huffman tables of T.81 Annex K and no restart markers."""
        codes = [(DC_LUMA, AC_LUMA)] + [(DC_CHROMA, AC_CHROMA)] * (len(self.components) - 1)
        parts = tuple(replace(c, dc=dc, ac=ac) for c, (dc, ac) in zip(self.components, codes, strict=True))
        return replace(self, components=parts, restart=0)


@dataclass(frozen=True)
class Picture:
    """One JPEG in parts; `entropy` is everything between the SOS segment and EOI."""

    header: Header
    entropy: bytes


def _tables(segment: bytes, length: int | None) -> dict[int, bytes]:
    """Tables of a DQT (`length` 64) or DHT (None: 16 counts say) segment by their class/identifier byte."""
    found: dict[int, bytes] = {}
    i = 0
    while i < len(segment):
        size = length if length is not None else 16 + sum(segment[i + 1 : i + 17])
        table = segment[i + 1 : i + 1 + size]
        if len(table) != size:
            raise StripError("a table is cut short")
        found[segment[i]] = table
        i += 1 + size
    return found


def _ycc(identifiers: bytes, jfif: bool, adobe: int | None) -> bool:
    """Whether three components are YCbCr without doubt (libjpeg's rules, the odd cases refused)."""
    return len(identifiers) == 3 and identifiers != b"RGB" and (jfif or adobe in (None, 1))


@lru_cache(maxsize=4096)
def parse_header(head: bytes) -> Header:
    """The header in `head`: all bytes from SOI to the end of the SOS segment.

    Raises StripError where it is not baseline, 8 bit, one interleaved scan, with all tables there.
    """
    quantisation: dict[int, bytes] = {}
    huffman: dict[int, bytes] = {}
    frame, scan, restart, jfif, adobe = b"", b"", 0, False, None
    for marker, segment in _segments(head):
        if marker == 0xDB:
            quantisation |= _tables(segment, 64)  # a 16-bit table has an identifier >= 16, which no component names
        elif marker == 0xC4:
            huffman |= _tables(segment, None)
        elif marker == 0xC0:
            frame = segment
        elif 0xC1 <= marker <= 0xCF:
            raise StripError("not baseline")
        elif marker == 0xDD and len(segment) == 2:
            restart = int.from_bytes(segment, "big")
        elif marker == 0xE0 and segment.startswith(b"JFIF\0"):
            jfif = True
        elif marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12:
            adobe = segment[11]
        elif marker == 0xDA:
            scan = segment
    count = frame[5] if len(frame) > 5 else 0
    if not count or len(frame) != 6 + 3 * count or frame[0] != 8:
        raise StripError("no 8-bit baseline frame header")
    if len(scan) != 4 + 2 * count or scan[0] != count or scan[-3:] != b"\0\x3f\0":
        raise StripError("not one interleaved scan")
    parts = []
    for k in range(count):
        identifier, sampling, q = frame[6 + 3 * k : 9 + 3 * k]
        if scan[1 + 2 * k] != identifier:
            raise StripError("scan and frame name other components")
        codes = scan[2 + 2 * k]
        try:
            parts.append(Component((sampling >> 4, sampling & 15), quantisation[q], huffman[codes >> 4], huffman[16 | codes & 15]))
        except KeyError:
            raise StripError("a table is missing") from None
        if 0 in parts[-1].quantisation or 0 in parts[-1].sampling:
            raise StripError("a quantisation or sampling factor of 0")
    height, width = struct.unpack(">HH", frame[1:5])
    if not height or not width:
        raise StripError("no size")
    return Header(height, width, tuple(parts), restart, _ycc(frame[6::3], jfif, adobe))


def _segments(data: bytes) -> list[tuple[int, bytes]]:
    """(marker, payload) of every segment up to and with SOS. Raises StripError."""
    if data[:2] != SOI:
        raise StripError("no SOI")
    found = []
    i = 2
    while True:
        while data[i : i + 2] == b"\xff\xff":  # fill bytes
            i += 1
        if i + 4 > len(data) or data[i] != 0xFF:
            raise StripError("no marker where one belongs")
        marker, size = data[i + 1], int.from_bytes(data[i + 2 : i + 4], "big")
        if size < 2 or i + 2 + size > len(data):
            raise StripError("truncated header")
        found.append((marker, data[i + 4 : i + 2 + size]))
        i += 2 + size
        if marker == 0xDA:
            return found


def header_size(data: bytes) -> int:
    """Bytes from SOI to the end of the first SOS segment. Raises StripError."""
    i = 2
    segments = _segments(data)
    for _, segment in segments:
        while data[i : i + 2] == b"\xff\xff":
            i += 1
        i += 4 + len(segment)
    return i


def parse(data: bytes, head: bytes = b"") -> tuple[Picture, bytes]:
    """`data` in parts, and its header bytes; `head`, the header bytes of a neighbour, saves parsing an equal header.

    Raises StripError where it is no complete baseline JPEG. APPn and comments are not kept.
    """
    if not head or not data.startswith(head):
        head = data[: header_size(data)]
    header = parse_header(head)
    end = len(head)
    while True:
        found = MARKER.search(data, end)
        if found is None:
            raise StripError("truncated: no EOI")
        code = data[found.start() + 1]
        if code == 0xD9:
            return Picture(header, data[len(head) : found.start()]), head
        if not (0xD0 <= code <= 0xD7 and header.restart):
            raise StripError("a marker inside the scan")
        end = found.end()


def _segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


@lru_cache(maxsize=256)
def header_bytes(header: Header) -> bytes:
    """`header` as a file begins: SOI, JFIF, tables, frame, restart interval, scan. Each table is written once."""
    tables: tuple[list[bytes], list[bytes], list[bytes]] = ([], [], [])  # quantisation, DC, AC
    frame = struct.pack(">BHHB", 8, header.height, header.width, len(header.components))
    scan = bytes([len(header.components)])
    for k, component in enumerate(header.components):
        slots = []
        for known, table in zip(tables, (component.quantisation, component.dc, component.ac), strict=True):
            if table not in known:
                known.append(table)
            slots.append(known.index(table))
        h, v = component.sampling
        frame += bytes([k + 1, h << 4 | v, slots[0]])
        scan += bytes([k + 1, slots[1] << 4 | slots[2]])
    parts = [SOI, JFIF, *(_segment(0xDB, bytes([i]) + t) for i, t in enumerate(tables[0])), _segment(0xC0, frame)]
    coded = [(i, kind, t) for kind in (0, 1) for i, t in enumerate(tables[1 + kind])]
    parts += [_segment(0xC4, bytes([kind << 4 | i]) + t) for i, kind, t in sorted(coded)]  # libjpeg's order: DC, AC, DC, AC
    if header.restart:
        parts.append(_segment(0xDD, struct.pack(">H", header.restart)))
    parts.append(_segment(0xDA, scan + b"\0\x3f\0"))
    return b"".join(parts)


@lru_cache(maxsize=1024)
def codes(table: bytes) -> dict[int, str]:
    """Huffman codes of a DHT table as bit strings, by symbol (T.81 Annex C). Raises StripError where they overflow."""
    found: dict[int, str] = {}
    code, i = 0, 16
    for length in range(1, 17):
        for _ in range(table[length - 1]):
            if code >= 1 << length:
                raise StripError("a Huffman table has too many codes")
            found[table[i]] = format(code, f"0{length}b")
            code, i = code + 1, i + 1
        code <<= 1
    return found


def pack_bits(bits: str) -> bytes:
    """Entropy-coded bytes of a bit string: filled up with ones, FF followed by 00."""
    bits += "1" * (-len(bits) % 8)
    return int("1" + bits, 2).to_bytes(len(bits) // 8 + 1, "big")[1:].replace(b"\xff", b"\xff\0")


def magnitude(value: int) -> tuple[int, str]:
    """Size category of a DC difference and the bits after its code (T.81, F.1.2.1)."""
    size = abs(value).bit_length()
    return size, format(value if value > 0 else value + (1 << size) - 1, f"0{size}b") if size else ""


@lru_cache(maxsize=256)
def black_entropy(header: Header) -> bytes:
    """Entropy-coded bytes of a picture of `header` whose every pixel decodes to exactly 0.

    Luma DC is the first level at or below -1024 after dequantisation (-128 in every pixel), one level lower
    where it would be met exactly, so that no decoder's rounding shows; everything else is 0, and chroma 0 is
    grey. Raises StripError where the Huffman tables lack a symbol it needs (optimised tables may).
    """
    level = -(1024 // header.components[0].quantisation[0] + 1)
    size, extra = magnitude(level)
    try:
        flat = [codes(c.dc)[0] + codes(c.ac)[0] for c in header.components]  # DC difference 0, end of block
        first = codes(header.components[0].dc)[size] + extra + codes(header.components[0].ac)[0]
    except KeyError:
        raise StripError("the Huffman tables cannot spell a black frame") from None
    blocks = [c.sampling[0] * c.sampling[1] for c in header.components]
    mcu = "".join(code * count for code, count in zip(flat, blocks, strict=True))
    return pack_bits(first + mcu[len(flat[0]) :] + mcu * (header.mcus - 1))
