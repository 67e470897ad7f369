"""Entropy-coded bytes from one set of Huffman tables to the standard ones, without touching a coefficient.

Pure Python, about 6 ms per face crop: only frames whose encoder optimised its tables (strip mode 1) come here.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from jmt_dist.data.jpeg import RESTART, Component, Picture, StripError, codes, magnitude, pack_bits

MAX_DC, MAX_AC = 11, 10  # size categories of 8-bit baseline (T.81, F.1.2)


@lru_cache(maxsize=64)
def _lookup(table: bytes) -> list[tuple[int, int]]:
    """(code length, symbol) for every 16 bits that may come next; length 0 where no code matches."""
    found: list[tuple[int, int]] = []
    for symbol, code in codes(table).items():  # in code order, so that the list fills from below
        found += [(len(code), symbol)] * (1 << (16 - len(code)))
    return found + [(0, 0)] * (65_536 - len(found))


class _Bits:
    """Entropy-coded bytes of one restart interval, to be read from a bit position."""

    def __init__(self, entropy: bytes) -> None:
        data = entropy.replace(b"\xff\0", b"\xff")
        self.size = 8 * len(data)
        raw = np.frombuffer(data + bytes(8), np.uint8).astype(np.uint32)
        self.words: list[int] = (raw[:-3] << 24 | raw[1:-2] << 16 | raw[2:-1] << 8 | raw[3:]).tolist()
        self.text = format(int.from_bytes(b"\1" + data + bytes(8), "big"), "b")[1:]  # 64 zeros past the end: reads stay inside


def _block(bits: _Bits, at: int, ac: list[tuple[int, int]], standard: dict[int, str], out: list[str]) -> int:
    """Copy the AC symbols of one block; returns the bit position after it."""
    words, text = bits.words, bits.text
    k = 1
    while k < 64:
        length, symbol = ac[words[at >> 3] >> (16 - (at & 7)) & 0xFFFF]
        size = symbol & 15
        if not length or size > MAX_AC:
            raise StripError("no code of the Huffman table matches")
        end = at + length + size
        if end > bits.size:
            raise StripError("the entropy-coded bytes end early")
        out.append(standard[symbol])
        out.append(text[at + length : end])
        at = end
        if symbol == 0:
            return at
        if not size and symbol != 0xF0:
            raise StripError("a symbol that baseline JPEG does not have")
        k += (symbol >> 4) + 1
    if k > 64:
        raise StripError("a block of more than 64 coefficients")
    return at


def _dc(bits: _Bits, at: int, lookup: list[tuple[int, int]]) -> tuple[int, int]:
    """(DC difference, bit position after it)."""
    length, size = lookup[bits.words[at >> 3] >> (16 - (at & 7)) & 0xFFFF]
    end = at + length + size
    if not length or size > MAX_DC or end > bits.size:
        raise StripError("no DC code matches")
    extra = bits.text[at + length : end]
    value = int(extra, 2) if extra else 0
    return (value if not size or extra[0] == "1" else value - (1 << size) + 1), end


def transcode(picture: Picture) -> bytes:
    """The entropy-coded bytes of `picture` under `picture.header.with_standard_codes()`; no restart markers.

    Every coefficient stays as it is. Raises StripError where the bytes are no valid scan of their header.
    """
    header = picture.header
    targets = header.with_standard_codes().components
    plan: list[tuple[int, Component, Component]] = [
        (k, c, t) for k, (c, t) in enumerate(zip(header.components, targets, strict=True)) for _ in range(c.sampling[0] * c.sampling[1])
    ]
    steps = [(k, _lookup(c.dc), _lookup(c.ac), codes(t.dc), codes(t.ac)) for k, c, t in plan]
    intervals = RESTART.split(picture.entropy) if header.restart else [picture.entropy]
    interval = header.restart or header.mcus
    if len(intervals) != -(-header.mcus // interval):
        raise StripError("restart markers are missing or too many")
    out: list[str] = []
    sent = [0] * len(targets)  # DC values last written
    left = header.mcus
    for part in intervals:
        bits, at, last = _Bits(part), 0, [0] * len(targets)
        for _ in range(min(interval, left)):
            for k, dc, ac, dc_codes, ac_codes in steps:
                difference, at = _dc(bits, at, dc)
                last[k] += difference
                size, extra = magnitude(last[k] - sent[k])
                if size > MAX_DC:
                    raise StripError("a DC value out of range")
                sent[k] = last[k]
                out += (dc_codes[size], extra)
                at = _block(bits, at, ac, ac_codes, out)
        left -= interval
        if bits.size - at >= 8:
            raise StripError("bytes are left over after the last block")
    return pack_bits("".join(out))
