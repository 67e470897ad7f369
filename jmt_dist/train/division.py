"""How a batch divides over ranks: pure arithmetic, importable without torch."""

from __future__ import annotations

from jmt_dist.errors import UserError


def usable_ranks(batch: int, world: int, accumulation: int = 1) -> int:
    """The largest number of ranks, at most `world`, over which `batch` divides evenly; 0 where accumulation alone does not divide it."""
    return next((ranks for ranks in range(world, 0, -1) if batch % (ranks * accumulation) == 0), 0)


def micro_batch(stage: str, batch: int, world: int, accumulation: int = 1) -> int:
    """Subsequences per rank and micro-step of a stage's batch (DESIGN section 2). Raises UserError where it is not whole."""
    if batch % (world * accumulation):
        best = usable_ranks(batch, world, accumulation)
        by = f"{world} ranks" if accumulation == 1 else f"{world} ranks x {accumulation} accumulation steps"
        remedy = (
            f"Use {best} rank{'s' * (best > 1)} (the largest number that works) or a divisible {stage}.batch."
            if best
            else f"No number of ranks works with {stage}.accumulation={accumulation}; change it or {stage}.batch."
        )
        raise UserError(f"{stage}.batch={batch} does not divide over {by}", remedy)
    return batch // (world * accumulation)
