"""The sound that pass 1 lays down (9 GB for the whole dataset): deleted when no shard needs it any more, decoded again where one does.

A video's sound is needed until every shard with a sample of it is finished, whichever process or job makes that shard. What is
finished is read from the results that shards leave, so it is the same after a kill and for many jobs side by side.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jmt_dist.data.geometry import RATE
from jmt_dist.data.pack_media import read_media
from jmt_dist.data.pack_shard import ShardTask, finished, results_folder
from jmt_dist.data.pack_video import SOUND, VideoTask, read_result, require_source, video_folder
from jmt_dist.data.progress import Progress, in_processes
from jmt_dist.errors import UserError


def needs_of(videos: Iterable[VideoTask], tasks: Iterable[ShardTask]) -> dict[str, frozenset[str]]:
    """Names of the shards that hold samples of each video; none for a video whose units are left out."""
    needs: dict[str, set[str]] = {task.video: set() for task in videos}
    for task in tasks:
        for source in task.sources:
            needs[source.video].add(task.name)
    return {video: frozenset(names) for video, names in needs.items()}


class Sounds:
    """The sound of all videos during pass 2; `needs` as of `needs_of`."""

    def __init__(self, out: Path, work: Path, needs: Mapping[str, frozenset[str]]) -> None:
        self._out, self._work = out, work
        self._needs = dict(needs)
        self._finished: set[str] = set()

    def drop(self) -> None:
        """Delete the sound of every video whose shards are all finished.

        Two jobs that end their last shards at once may both look before either has told: what they leave goes at the end of packing.
        """
        results = results_folder(self._work)
        # one listing for each shard made; what is listed may be of a tar that was lost since, so it is looked at once
        listed = {entry.name.removesuffix(".json") for entry in os.scandir(results)} - self._finished
        self._finished |= {name for name in listed if finished(results, self._out, name) is not None}
        for video in [video for video, names in self._needs.items() if names <= self._finished]:
            del self._needs[video]
            _path(self._work, video).unlink(missing_ok=True)

    def restore(self, videos: Iterable[VideoTask], tasks: Iterable[ShardTask], workers: int) -> None:
        """Decode again what `tasks` need and an earlier run deleted: a shard that it had finished has been lost since."""
        needed = {source.video for task in tasks for source in task.sources}
        lacking = [task for task in videos if task.video in needed and not _path(self._work, task.video).is_file()]
        if lacking:
            with Progress("sound that a lost shard needs again", len(lacking), "videos") as progress:
                for _ in in_processes(_decode_again, lacking, workers):
                    progress.advance()


def _path(work: Path, video: str) -> Path:
    return video_folder(work, video) / SOUND


def _decode_again(task: VideoTask) -> None:
    """Lay down a video's sound beside what pass 1 left. Raises UserError where the source is not what it was."""
    path, source = _path(task.work, task.video), task.units[0].media
    require_source(task.units)
    before, media = read_result(task), read_media(source)
    if before is None or before.seconds != len(media.pcm) / RATE:
        raise UserError(f"{source} is not what it was when packing began", "Put it back, or remove the shard folder and pack anew.")
    partial = path.with_name(f"{SOUND}.{socket.gethostname()}.{os.getpid()}")  # jobs beside each other may lack the same
    try:
        with partial.open("wb") as file:
            np.save(file, media.pcm)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
