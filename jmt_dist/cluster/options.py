"""The words of the programs that submit, watch and end jobs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from jmt_dist.config import Options


class SubmitOptions(Options):
    """Submission of a recipe's folds to a site."""

    recipe: str = Field(description="recipe file, as in launch/recipes/")
    site: str = Field(description="site file, as in slurm/sites/")
    out: str = Field("", description="run folder; empty: runs/<name of the recipe>")
    folds: list[str] = Field([], description="folds to run; empty: all that the shards hold")
    dry: bool = Field(False, description="check everything and print what would be submitted, then stop")
    compare: bool = Field(True, description="once the folds have ended, write and print Table 1 (SLURM: a job of its own)")
    share: list[str] = Field([], description="run folders whose finished stages are linked instead of done again")
    wait: bool = Field(False, description="SLURM: stay until the jobs have ended, and show them")


class RunFoldOptions(Options):
    """One fold in this process."""

    recipe: str = Field(description="recipe file, as in launch/recipes/")
    site: str = Field(description="site file, as in slurm/sites/")
    fold: str = Field(description="fold to run: official, fold-1, …")
    out: str = Field("", description="run folder; empty: runs/<name of the recipe>")


class SweepOptions(Options):
    """Several variants of a recipe, submitted together."""

    sweep: str = Field(description="sweep file: a recipe, and variants, a grid or random values")
    site: str = Field(description="site file, as in slurm/sites/")
    out: str = Field("", description="folder of the sweep, one run folder per variant; empty: runs/<name of the sweep file>")
    folds: list[str] = Field([], description="folds to run; empty: all that the shards hold")
    share: list[str] = Field([], description="run folders whose finished stages are linked instead of done again")
    dry: bool = Field(False, description="check everything and print what would be submitted, then stop")
    compare: bool = Field(True, description="once all have ended, write and print the ranked table (SLURM: a job of its own)")
    wait: bool = Field(False, description="SLURM: stay until the jobs have ended, and show them")


class Range(Options):
    """Values of a random sweep between two bounds; whole numbers where both bounds are."""

    low: int | float = Field(description="smallest value")
    high: int | float = Field(description="largest value")
    log: bool = Field(False, description="even on a logarithmic scale")

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low} and high={self.high} are no range{' of a logarithm' if self.log else ''}")
        return self


Choices = Annotated[list[Any], Field(min_length=1)]
# one of the two by its look, so that an error speaks of that one
Values = Annotated[
    Annotated[Choices, Tag("values")] | Annotated[Range, Tag("range")],
    Discriminator(lambda value: "values" if isinstance(value, list) else "range"),
]


class SweepFile(Options):
    """A sweep file: a recipe, and its variants: named ones, every combination of a grid, or random draws."""

    recipe: str = Field(description="recipe file, relative to the sweep file")
    variants: dict[str, list[str]] = Field({}, description="name of each variant, and its key=value words")
    grid: dict[str, Choices] = Field({}, description="key to its values: one variant for every combination")
    random: dict[str, Values] = Field({}, description="key to its values, or to {low, high, log}: `samples` draws")
    samples: Annotated[int, Field(gt=0)] = Field(20, description="draws of a random sweep")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of the draws")

    @model_validator(mode="after")
    def _one_kind(self) -> SweepFile:
        if sum(map(bool, (self.variants, self.grid, self.random))) != 1:
            raise ValueError("a sweep file needs one of `variants`, `grid` and `random`, with something in it")
        return self


class RunOptions(Options):
    """A run folder."""

    out: str = Field(description="run folder, as submit_folds.py printed it")


class ResumeOptions(RunOptions):
    """Going on with a run folder or a sweep."""

    wait: bool = Field(False, description="SLURM: stay until the jobs have ended, and show them")


class StatusOptions(RunOptions):
    """How to show a run folder or a sweep's folder."""

    watch: bool = Field(False, description="go on showing until all jobs have ended")
    every: Annotated[float, Field(gt=0)] = Field(5.0, description="seconds between two looks of watch=true")
    lines: Annotated[int, Field(ge=0)] = Field(15, description="last lines shown of the log of a failed fold")


class CheckOptions(Options):
    """Checks of a site."""

    site: str = Field(description="site file, as in slurm/sites/")
    out: str = Field("runs", description="folder that will hold run folders; must be shared by the nodes")
    recipe: str = Field("", description="also check what this recipe needs: shards and initial weights")
