"""The fixture's video files: H.264 + AAC in MP4, MPEG-4 + PCM in AVI, small pictures, full sound."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from jmt_dist.affwild2.fixture_plan import Sound, VideoPlan

WIDTH, HEIGHT = 160, 120
FACE = 56  # side of a face in the picture
_TICKS = 1000  # time base of pictures at a variable rate
_LAYOUTS = {1: "mono", 2: "stereo"}


def place_faces(faces: list[NDArray[np.uint8]], frames: int) -> NDArray[np.uint8]:
    """Pictures [F, 120, 160, 3]: `faces` (each [F, 56, 56, 3]) side by side before a plain wall."""
    ramp = np.linspace(70, 130, HEIGHT, dtype=np.uint8)
    pictures = np.repeat(np.broadcast_to(ramp[:, None, None], (HEIGHT, WIDTH, 3))[None], frames, 0).copy()
    for k, face in enumerate(faces):
        left = (k + 1) * WIDTH // (len(faces) + 1) - FACE // 2
        pictures[:, 28 : 28 + FACE, left : left + FACE] = face
    return pictures


def write_media(path: Path, plan: VideoPlan, pictures: NDArray[np.uint8], pcm: NDArray[np.int16]) -> None:
    """Write pictures [F, 120, 160, 3] and sound [S, channels] as `plan` says; pcm sample 0 is at the sound's start."""
    options = {"movflags": "+faststart"} if plan.suffix == ".mp4" else {}
    with av.open(str(path), "w", format=plan.suffix[1:], options=options) as container:
        container.flags |= 0x400  # AVFMT_FLAG_BITEXACT: no encoder version, so that the same options give the same bytes
        video = _video_stream(container, plan)
        audio = _audio_stream(container, plan.sound)
        container.start_encoding()
        chunks = _sound_frames(plan.sound, pcm, audio)
        lead = plan.sound.lead
        times = plan.times(len(pictures)) + lead
        for time, picture in zip(times, pictures, strict=True):
            while chunks and chunks[0].pts / plan.sound.rate <= time:
                container.mux(audio.encode(chunks.pop(0)))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = video.codec_context.time_base
            frame.pts = round(time / float(frame.time_base))
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for chunk in chunks:
            container.mux(audio.encode(chunk))
        if audio is not None:
            container.mux(audio.encode(None))


def _video_stream(container: Any, plan: VideoPlan) -> Any:
    if plan.suffix == ".avi":
        stream = container.add_stream("mpeg4", rate=plan.fps, options={"qscale": "6", "flags": "+qscale+bitexact"})
    else:
        # half of the files have B-frames, and with them packets out of order and a first timestamp after 0
        speed = {"preset": "veryfast", "bf": "2"} if sum(os.fsencode(plan.stem)) % 2 else {"preset": "ultrafast"}
        stream = container.add_stream("libx264", rate=plan.fps, options={**speed, "crf": "30", "flags": "+bitexact"})
    stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    stream.codec_context.thread_count = 1
    if plan.variable or plan.sound.lead:
        stream.codec_context.time_base = Fraction(1, _TICKS)
    else:
        stream.codec_context.time_base = Fraction(1, plan.fps)
    return stream


def _audio_stream(container: Any, sound: Sound) -> Any:
    if sound.kind == "absent":
        return None
    stream = container.add_stream(sound.codec, rate=sound.rate, layout=_LAYOUTS[sound.channels], options={"flags": "+bitexact"})
    if sound.codec == "aac":
        stream.bit_rate = 64_000 * sound.channels
    return stream


def _sound_frames(sound: Sound, pcm: NDArray[np.int16], stream: Any) -> list[Any]:
    if sound.kind != "voice":
        return []
    aac = sound.codec == "aac"
    step = 1024 if aac else 4096
    frames = []
    for start in range(0, len(pcm), step):
        part = pcm[start : start + step]
        if aac:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part.T.astype(np.float32) / 32768), "fltp", _LAYOUTS[sound.channels])
        else:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part.reshape(1, -1)), "s16", _LAYOUTS[sound.channels])
        frame.sample_rate, frame.time_base = sound.rate, Fraction(1, sound.rate)
        frame.pts = start + round(sound.start * sound.rate)
        frames.append(frame)
    return frames
