"""Strips against Pillow (libjpeg-turbo): lossless where promised, black exactly black, nothing in a source can break one."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from jmt_dist.data.huffman import transcode
from jmt_dist.data.jpeg import JFIF, StripError, black_entropy, header_bytes, parse
from jmt_dist.data.strip import decode, join, join_coefficients, make_strip, split

from .tree import jpeg, picture

PICTURES = [picture(k) for k in range(6)]
SAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


def fill(frames: list[bytes | None]) -> list[bytes | None]:
    """71 frames, the given ones over and over."""
    return [frames[k % len(frames)] for k in range(71)]


def pixels(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def frames_of(strip: bytes) -> NDArray[np.uint8]:
    return pixels(strip).reshape(71, 112, 112, 3)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("quality", [30, 75, 92, 100])
def test_mode_0_gives_the_source_files_back_and_decodes_to_them(sampling: str, quality: int) -> None:
    sources = fill([jpeg(p, quality=quality, subsampling=SAMPLINGS[sampling]) for p in PICTURES])
    strip = make_strip(sources)
    assert strip.mode == 0 and all(strip.present) and strip.unreadable == ()
    if quality < 100:  # at 100 Pillow writes one all-ones table twice, the strip once
        assert split(strip.data) == sources  # Pillow's files have the JFIF header and no other APPn: byte for byte
    assert [parse(frame)[0] for frame in split(strip.data)] == [parse(source or b"")[0] for source in sources]
    decoded, wanted = frames_of(strip.data), np.stack([pixels(s) for s in sources if s])
    rows = slice(None) if sampling != "4:2:0" else slice(1, 111)  # chroma rows are interpolated across borders
    assert np.array_equal(decoded[:, rows], wanted[:, rows])


def test_strip_has_one_frame_per_restart_interval_and_less_than_its_sources() -> None:
    sources = [jpeg(p) for p in PICTURES] * 11
    strip = join([parse(s)[0] for s in sources])
    header = parse(strip)[0].header
    assert (header.height, header.width, header.restart) == (66 * 112, 112, 49)
    assert len(strip) < sum(map(len, sources)) - 60 * 600


def test_exif_and_comments_are_dropped_and_do_not_cost_the_mode() -> None:
    exif = Image.Exif()
    exif[0x010E] = "somebody's name"
    plain = [jpeg(p) for p in PICTURES]
    strip = make_strip(fill([jpeg(p, exif=exif, comment=b"hello") for p in PICTURES]))
    assert strip.mode == 0 and b"somebody" not in strip.data and b"hello" not in strip.data
    assert split(strip.data)[:6] == plain


@pytest.mark.parametrize("quality", range(1, 101, 3))
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_black_frame_decodes_to_exact_zero(quality: int, sampling: str) -> None:
    header = parse(jpeg(PICTURES[0], quality=quality, subsampling=SAMPLINGS[sampling]))[0].header
    black = header_bytes(header) + black_entropy(header) + b"\xff\xd9"
    assert pixels(black).shape == (112, 112, 3) and not pixels(black).any()


@pytest.mark.parametrize("quantum", [1, 2, 7, 16, 128, 255])
def test_black_is_exact_with_any_quantisation(quantum: int) -> None:
    header = parse(jpeg(PICTURES[0], qtables=[[quantum] * 64, [quantum] * 64]))[0].header
    assert not pixels(header_bytes(header) + black_entropy(header) + b"\xff\xd9").any()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_missing_frames_are_black_among_others_and_cost_no_mode(sampling: str) -> None:
    sources = fill([jpeg(p, subsampling=SAMPLINGS[sampling]) for p in PICTURES])
    for k in (0, 5, 6, 70):
        sources[k] = None
    strip = make_strip(sources)
    decoded = frames_of(strip.data)
    assert strip.mode == 0 and [k for k in range(71) if not strip.present[k]] == [0, 5, 6, 70]
    rows = slice(None) if sampling != "4:2:0" else slice(1, 111)
    assert not decoded[[0, 5, 6, 70], rows].any()
    assert np.array_equal(decoded[7, rows], pixels(sources[7] or b"")[rows])


def test_a_strip_without_any_picture_is_black_everywhere() -> None:
    strip = make_strip([None] * 71)
    assert strip.mode == 0 and not any(strip.present) and not frames_of(strip.data).any()


@pytest.mark.parametrize("settings_", [{"optimize": True}, {"restart_marker_blocks": 5}, {"optimize": True, "restart_marker_rows": 1}])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_mode_1_equals_what_libjpeg_writes_with_standard_tables(settings_: dict[str, int], sampling: str) -> None:
    """The reference is Pillow's own file of the same picture: the same coefficients in the standard codes."""
    own = [jpeg(p, subsampling=SAMPLINGS[sampling], **settings_) for p in PICTURES]
    standard = [jpeg(p, subsampling=SAMPLINGS[sampling]) for p in PICTURES]
    assert own != standard
    strip = make_strip(fill([*own, None]))
    assert strip.mode == 1 and sum(strip.present) == 61
    found = split(strip.data)
    assert found[:6] == standard and not pixels(found[6]).any()


def test_a_lone_frame_with_optimised_tables_gets_black_neighbours() -> None:
    flat = Image.new("RGB", (112, 112), (90, 90, 90))  # its own tables have a code or two: no black can be spelled
    with pytest.raises(StripError, match="black"):
        join([parse(jpeg(flat, optimize=True))[0], None])
    strip = make_strip([jpeg(flat, optimize=True)] + [None] * 70)
    decoded = frames_of(strip.data)
    assert strip.mode == 1 and (decoded[0] == 90).all() and not decoded[1:].any()


def test_extreme_coefficients_survive_transcoding() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray((rng.integers(0, 2, (112, 112, 3)) * 255).astype(np.uint8))
    for quality in (10, 100):
        own, standard = jpeg(noise, quality=quality, optimize=True), jpeg(noise, quality=quality)
        assert transcode(parse(own)[0]) == parse(standard)[0].entropy


REENCODED = {
    "progressive": {"progressive": True},
    "other quality": {"quality": 50},
    "other sampling": {"subsampling": 0},
    "RGB without YCbCr": {"keep_rgb": True},
}


@pytest.mark.parametrize("what", REENCODED)
def test_mode_2_is_close_to_its_sources(what: str) -> None:
    sources = fill([jpeg(p) for p in PICTURES])
    sources[3] = jpeg(PICTURES[3], **REENCODED[what])
    sources[9] = None
    strip = make_strip(sources)
    assert strip.mode == 2 and sum(strip.present) == 70
    decoded = frames_of(strip.data).astype(float)
    assert not decoded[9].any()  # no chroma subsampling in mode 2: exact to the border
    for k, least in ((2, 40), (3, 38), (4, 40)):  # the odd one may hold noise in full-resolution chroma, which q95 thins
        error = np.square(decoded[k] - pixels(sources[k] or b"")).mean()
        assert 10 * np.log10(255**2 / error) > least


def test_mode_2_of_gray_cmyk_png_and_other_sizes() -> None:
    gray, cmyk, small, big = jpeg(PICTURES[0].convert("L")), jpeg(PICTURES[1].convert("CMYK")), picture(7, 96), picture(8, 300)
    buffer = io.BytesIO()
    PICTURES[2].save(buffer, "PNG")  # a PNG that someone named .jpg
    strip = make_strip(fill([gray, cmyk, buffer.getvalue(), jpeg(small), jpeg(big)]))
    assert strip.mode == 2 and all(strip.present)
    decoded = frames_of(strip.data).astype(float)
    wanted = [PICTURES[0].convert("L").convert("RGB"), PICTURES[1], PICTURES[2], small.resize((112, 112)), big.resize((112, 112))]
    for k, image in enumerate(wanted):
        assert 10 * np.log10(255**2 / np.square(decoded[k] - np.asarray(image)).mean()) > 30
    assert (np.ptp(decoded[0], axis=2) <= 3).all()  # gray stays gray


def test_all_gray_is_re_encoded_as_rgb() -> None:
    strip = make_strip(fill([jpeg(p.convert("L")) for p in PICTURES]))
    assert strip.mode == 2 and parse(strip.data)[0].header.ycc


def broken(data: bytes) -> dict[str, bytes]:
    no_codes = bytearray(data)
    at = data.index(b"\xff\xc4") + 5
    no_codes[at : at + 16] = b"\xff" * 16  # the Huffman table claims 4080 codes
    return {"empty": b"", "text": b"<html>404</html>", "half": data[: len(data) // 2], "header": data[:300], "tables": bytes(no_codes)}


@pytest.mark.parametrize("what", ["empty", "text", "half", "header", "tables"])
def test_unreadable_frames_become_black_are_named_and_cost_no_mode(what: str) -> None:
    sources = fill([jpeg(p) for p in PICTURES])
    bad = broken(sources[4] or b"")[what]
    sources[0], sources[40] = bad, bad
    strip = make_strip(sources)
    assert strip.mode == 0 and strip.unreadable == (0, 40) and not strip.present[0] and strip.present[1]
    decoded = frames_of(strip.data)
    assert not decoded[[0, 40], 1:111].any() and decoded[1].any()


def test_nothing_but_unreadable_frames() -> None:
    strip = make_strip([b"x"] * 71)
    assert strip.mode == 0 and strip.unreadable == tuple(range(71)) and not frames_of(strip.data).any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_to_a_source_breaks_a_strip(data: st.DataObject) -> None:
    """Random bytes of a source overwritten: the strip still decodes, has 71 frames, and leaves the others as they were."""
    base = jpeg(PICTURES[0], optimize=data.draw(st.booleans()), progressive=data.draw(st.booleans()))
    damaged = bytearray(base)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(base) - 1))] = data.draw(st.integers(0, 255))
    other = jpeg(PICTURES[1])
    strip = make_strip([bytes(damaged), other, None])
    assert pixels(strip.data).shape == (336, 112, 3) and len(split(strip.data)) == 3
    assert strip.present[1:] == (True, False)
    found = pixels(split(strip.data)[1])
    if strip.mode < 2:
        assert np.array_equal(found, pixels(other))
    else:
        assert 10 * np.log10(255**2 / np.square(found.astype(float) - pixels(other)).mean()) > 40


def test_join_and_split_say_what_is_wrong() -> None:
    one, other = parse(jpeg(PICTURES[0]))[0], parse(jpeg(PICTURES[0], quality=50))[0]
    with pytest.raises(StripError, match="tables"):
        join([one, other])
    with pytest.raises(StripError, match="quantisation"):
        join_coefficients([one, other])
    with pytest.raises(StripError, match="112x112"):
        join([parse(jpeg(picture(0, 96)))[0]])
    with pytest.raises(StripError, match="restart interval"):
        split(jpeg(PICTURES[0]))
    strip = make_strip(fill([jpeg(PICTURES[0])])).data
    with pytest.raises(StripError, match="restart markers"):
        split(strip.replace(b"\xff\xd3", b"\xff\xd4", 1))
    with pytest.raises(StripError, match="cannot be decoded"):
        decode(strip[:5000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d[:-2], "no EOI"),
        (lambda d: b"\x89PNG" + d, "no SOI"),
        (lambda d: d[:200], "truncated"),
        (lambda d: d.replace(JFIF[:4], b"\xff\xe0\x00\x01", 1), "truncated"),
        (lambda d: d[:-2] + b"\xff\xd3\xff\xd9", "marker inside"),
        (lambda d: d.replace(b"\xff\xc0", b"\xff\xc2", 1), "baseline"),
        (lambda d: d.replace(b"\xff\xdb", b"\xff\xe7"), "table is missing"),
    ],
)
def test_parse_refuses_with_a_reason(spoil: object, message: str) -> None:
    with pytest.raises(StripError, match=message):
        parse(spoil(jpeg(PICTURES[0])))  # type: ignore[operator]
