"""Packing in many jobs: parts of pass 1, then parts of pass 2, then the end, which is `pack` itself (DESIGN section 6).

A part takes every n-th video or shard, so no two write the same file and no container is decoded twice. The end takes over
what the parts made, makes what a lost one did not, and writes the manifest: the bytes are those of packing in one place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jmt_dist.affwild2.layout import Dataset
from jmt_dist.config import PackOptions
from jmt_dist.data.pack import Say, claim, pack, survey
from jmt_dist.data.pack_guard import WORK, disk_errors, finished_manifest, locked
from jmt_dist.data.pack_steps import pack_shards, plan_shards, prepare_videos, settle, video_tasks
from jmt_dist.data.pack_video import VideoResult, read_result
from jmt_dist.data.report import read_report
from jmt_dist.errors import UserError

Step = Literal["videos", "shards", "end"]


@dataclass(frozen=True)
class PackPart:
    """Part `part` of `parts` of a step, to be called in a job; `umask` is that of the person who packs."""

    options: PackOptions
    dataset: Dataset
    step: Step
    part: int
    parts: int
    umask: int

    def __call__(self) -> list[str]:
        """Do it; returns [] or, for an error a user can cause, [sentence, remedy]."""
        os.umask(self.umask)  # a job's own is private, and the shards are for everyone who may read the folder
        try:
            if self.step == "end":
                pack(self.options)
            else:
                out = Path(self.options.out)
                with disk_errors(out), locked(out, shared=True):
                    self._videos(out) if self.step == "videos" else self._shards(out)
        except UserError as error:
            return [error.sentence, error.remedy]
        return []

    def checkpoint(self) -> Any:
        """What submitit queues when the job is preempted or out of time: the same part, which goes on where it stopped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _videos(self, out: Path) -> None:
        prepare_videos(self.options, video_tasks(self.dataset, out / WORK)[self.part :: self.parts])

    def _shards(self, out: Path) -> None:
        videos: list[VideoResult] = []
        for task in video_tasks(self.dataset, out / WORK):
            result = read_result(task)
            if result is None:
                raise UserError(f"video {task.video} is not prepared", "The last job makes what is missing.")
            videos.append(result)
        content = settle(self.options, self.dataset, videos)
        pack_shards(self.options, self.dataset, plan_shards(self.options, self.dataset, content), self.part, self.parts)


def plan_parts(options: PackOptions, parts: int, say: Say = print) -> list[tuple[Step, list[PackPart]]]:
    """The steps of packing in `parts` jobs each, empty where all is packed. Raises UserError as `pack` does."""
    out = Path(options.out)
    with disk_errors(out):
        claim(out, Path(options.source))
        with locked(out):
            report = read_report(out)
            manifest = finished_manifest(out, options, str(Path(options.source).resolve()), report.source if report else None)
            if manifest is not None:
                return []
            dataset = survey(options, say)
            (out / WORK).mkdir(exist_ok=True)
    umask = os.umask(0)
    os.umask(umask)

    def step(name: Step, count: int) -> tuple[Step, list[PackPart]]:
        return name, [PackPart(options, dataset, name, part, count, umask) for part in range(count)]

    return [step("videos", parts), step("shards", parts), step("end", 1)]
