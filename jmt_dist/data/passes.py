"""Several passes of a loader as one epoch: `offsets_per_epoch` of the backbones (DESIGN section 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jmt_dist.data.pipeline import Batch, ClipLoader


class Passes:
    """An epoch of `passes` passes over a training loader's samples, each pass in an order and with offsets of its own.

    A sample's offset is drawn anew in each pass, so that it may come twice in an epoch, in batches far apart.
    """

    def __init__(self, loader: ClipLoader, passes: int) -> None:
        self.loader, self.passes, self.steps = loader, passes, passes * loader.steps

    def batches(self, epoch: int = 0, done: int = 0) -> Iterator[Batch]:
        """The steps of `epoch` after the first `done`."""
        first, rest = divmod(done, self.loader.steps)
        for number in range(first, self.passes):
            yield from self.loader.batches(epoch * self.passes + number, rest if number == first else 0)

    def state(self) -> dict[str, Any]:
        """The position after the batch last returned."""
        return self.loader.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a position of this rank."""
        self.loader.restore(state)

    def redivide(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from where a job of another number of ranks stopped."""
        self.loader.redivide(states)
