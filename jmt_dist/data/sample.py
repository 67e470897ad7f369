"""The sample contract: keys, members, their bytes, and the audio a sample carries (DESIGN section 6).

`shards/README.md` says the same for readers in other languages.
"""

from __future__ import annotations

import io
import re
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jmt_dist.affwild2.media import end_samples
from jmt_dist.data import geometry
from jmt_dist.data.geometry import RATE, STRIP, SUBSEQUENCE, WINDOW, end_frames

STRIP_MEMBER, ENDS_MEMBER, VA_MEMBER, PRESENT_MEMBER, ID_MEMBER = "strip.jpg", "ends.i32", "va.f32", "present.u8", "id.i32"
AUDIO_MEMBERS = {"wav": "audio.wav", "flac": "audio.flac"}
DTYPES: dict[str, tuple[str, tuple[int, ...]]] = {  # raw members: little-endian NumPy type and shape
    ENDS_MEMBER: ("<i4", (SUBSEQUENCE,)),
    VA_MEMBER: ("<f4", (SUBSEQUENCE, 2)),
    PRESENT_MEMBER: ("u1", (STRIP,)),
    ID_MEMBER: ("<i4", (4,)),
}
GEOMETRY: dict[str, int] = {  # written to the manifest; shards of another geometry are refused
    name.lower(): getattr(geometry, name)
    for name in ("SEGMENT", "STEP", "CLIPS", "CLIP_FRAMES", "OFFSETS", "STRIP", "SIZE", "RATE", "WINDOW")
}
LONGEST_NAME = 80  # bytes of an escaped unit name: USTAR names end at 100, `-0000-0.present.u8` is 18
_PLAIN = re.compile(rb"[A-Za-z0-9_-]")

AudioKind = Literal["wav", "flac"]


def escape(unit: str) -> str:
    """`unit` as it stands in keys: ASCII letters, digits, `_` and `-`; every other byte of its UTF-8 as %XX.

    A dot would begin the extension, a space would break the index, a slash the tar.
    """
    return "".join(chr(byte) if _PLAIN.match(bytes([byte])) else f"%{byte:02X}" for byte in unit.encode())


def unescape(text: str) -> str:
    """The inverse of `escape`."""
    return re.sub(rb"%([0-9A-F]{2})", lambda found: bytes([int(found[1], 16)]), text.encode()).decode()


def key(unit: str, m: int, p: int) -> str:
    """Key of sample (m, p) of a unit: `<unit>-<m>-<p>` with m in four digits."""
    return f"{escape(unit)}-{m:04d}-{p}"


def parse_key(text: str) -> tuple[str, int, int]:
    """(unit, m, p) of a key. Raises ValueError where it is none."""
    found = re.fullmatch(r"((?:[A-Za-z0-9_-]|%[0-9A-F]{2})+)-(\d{4,})-([0-3])", text)
    if not found:
        raise ValueError(f"`{text}` is not <unit>-<segment>-<phase>")
    return unescape(found[1]), int(found[2]), int(found[3])


@dataclass(frozen=True, eq=False)
class Sample:
    """One entry of a shard; arrays as in `DTYPES`, `audio` in the format `kind` names."""

    strip: bytes
    audio: bytes
    kind: AudioKind
    ends: NDArray[np.int32]
    va: NDArray[np.float32]
    present: NDArray[np.uint8]
    id: NDArray[np.int32]

    def members(self) -> list[tuple[str, bytes]]:
        """(extension, bytes) in the order in which they stand in the tar."""
        arrays: dict[str, NDArray[Any]] = {ENDS_MEMBER: self.ends, VA_MEMBER: self.va, PRESENT_MEMBER: self.present, ID_MEMBER: self.id}
        raw = [(name, _raw(name, array)) for name, array in arrays.items()]
        return [(STRIP_MEMBER, self.strip), (AUDIO_MEMBERS[self.kind], self.audio), *raw]

    @classmethod
    def from_members(cls, members: Mapping[str, bytes]) -> Sample:
        """The sample of a tar's members by extension. Raises ValueError: one is missing, unknown, or of a wrong size."""
        kinds: list[AudioKind] = [kind for kind in ("wav", "flac") if AUDIO_MEMBERS[kind] in members]
        if len(kinds) != 1:
            raise ValueError(f"{len(kinds)} audio members instead of one")
        wanted = {STRIP_MEMBER, AUDIO_MEMBERS[kinds[0]], *DTYPES}
        if set(members) != wanted:
            raise ValueError(f"members {sorted(members)} instead of {sorted(wanted)}")
        arrays = {}
        for name, (dtype, shape) in DTYPES.items():
            array = np.frombuffer(members[name], np.uint8)
            if array.nbytes != np.dtype(dtype).itemsize * int(np.prod(shape)):
                raise ValueError(f"{name} has {array.nbytes} bytes")
            arrays[name] = array.view(dtype).reshape(shape)
        names = (ENDS_MEMBER, VA_MEMBER, PRESENT_MEMBER, ID_MEMBER)
        return cls(members[STRIP_MEMBER], members[AUDIO_MEMBERS[kinds[0]]], kinds[0], *(arrays[name] for name in names))


def _raw(name: str, array: NDArray[Any]) -> bytes:
    dtype, shape = DTYPES[name]
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, not {shape}")
    return np.ascontiguousarray(array, dtype).tobytes()


def labels_of(va: NDArray[np.float32], m: int, p: int) -> NDArray[np.float32]:
    """Labels [64, 2] of the end frames of sample (m, p) from a unit's rows [N, 2]; NaN past the end."""
    rows = end_frames(m, p) - 1
    found = np.full((SUBSEQUENCE, 2), np.nan, np.float32)
    inside = rows < len(va)
    found[inside] = va[rows[inside]]
    return found


def audio_of(
    pcm: NDArray[np.int16], timestamps: NDArray[np.float64], m: int, p: int, interval: float | None = None
) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """(audio, ends [64]) of sample (m, p): all of `pcm` that its 64 windows cover, silence where there is none.

    `pcm` is a video's int16 mono sound with sample 0 at second 0 of `timestamps` [F]. Window n is
    audio[ends[n] - WINDOW : ends[n]], and WINDOW <= ends[n] <= len(audio). `interval` as in `end_samples`.
    """
    stops = end_samples(timestamps, end_frames(m, p), interval=interval)
    start, stop = int(stops.min()) - WINDOW, int(stops.max())
    audio = np.zeros(stop - start, np.int16)
    first, last = max(start, 0), min(stop, len(pcm))
    if first < last:
        audio[first - start : last - start] = pcm[first:last]
    return audio, (stops - start).astype(np.int32)


def encode_audio(pcm: NDArray[np.int16], kind: AudioKind) -> bytes:
    """Mono PCM16 at 44.1 kHz as a file."""
    buffer = io.BytesIO()
    if kind == "wav":
        with wave.open(buffer, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(RATE)
            out.writeframes(pcm.astype("<i2").tobytes())
    else:
        import soundfile

        soundfile.write(buffer, pcm, RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def decode_audio(data: bytes, kind: AudioKind) -> NDArray[np.int16]:
    """The inverse of `encode_audio`. Raises ValueError where it is no such file."""
    try:
        if kind == "wav":
            with wave.open(io.BytesIO(data)) as file:
                rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
                pcm: NDArray[np.int16] = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.int16)
                complete = len(pcm) == file.getnframes()
        else:
            import soundfile

            with soundfile.SoundFile(io.BytesIO(data)) as file:
                rate, channels, width = file.samplerate, file.channels, 2 if file.subtype == "PCM_16" else 0
                pcm = file.read(dtype="int16")
                complete = len(pcm) == file.frames
    except (wave.Error, EOFError, RuntimeError) as error:  # soundfile's errors are RuntimeErrors
        raise ValueError(f"cannot be decoded: {error}") from None
    if (rate, channels, width) != (RATE, 1, 2) or not complete:
        raise ValueError(f"not complete mono PCM16 at {RATE} Hz")
    return pcm
