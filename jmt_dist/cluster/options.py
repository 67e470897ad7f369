"""The words of the programs that submit, watch and end jobs."""

from __future__ import annotations

from pydantic import Field

from jmt_dist.config import Options


class SubmitOptions(Options):
    """Submission of a recipe's folds to a site."""

    recipe: str = Field(description="recipe file, as in launch/recipes/")
    site: str = Field(description="site file, as in slurm/sites/")
    out: str = Field("", description="run folder; empty: runs/<name of the recipe>")
    folds: list[str] = Field([], description="folds to run; empty: all that the shards hold")
    dry: bool = Field(False, description="check everything and print what would be submitted, then stop")
    compare: bool = Field(True, description="once the folds have ended, write and print Table 1 (SLURM: a job of its own)")


class RunFoldOptions(Options):
    """One fold in this process."""

    recipe: str = Field(description="recipe file, as in launch/recipes/")
    site: str = Field(description="site file, as in slurm/sites/")
    fold: str = Field(description="fold to run: official, fold-1, …")
    out: str = Field("", description="run folder; empty: runs/<name of the recipe>")


class SweepOptions(Options):
    """Several variants of a recipe, submitted one after the other."""

    sweep: str = Field(description="sweep file: `recipe: path` and `variants: {name: [words]}`")
    site: str = Field(description="site file, as in slurm/sites/")
    out: str = Field("", description="folder of the sweep, one run folder per variant; empty: runs/<name of the sweep file>")
    folds: list[str] = Field([], description="folds to run; empty: all that the shards hold")
    dry: bool = Field(False, description="check everything and print what would be submitted, then stop")


class SweepFile(Options):
    """A sweep file: a recipe, and what each variant changes in it."""

    recipe: str = Field(description="recipe file, relative to the sweep file")
    variants: dict[str, list[str]] = Field(description="name of each variant, and its key=value words", min_length=1)


class RunOptions(Options):
    """A run folder."""

    out: str = Field(description="run folder, as submit_folds.py printed it")


class CheckOptions(Options):
    """Checks of a site."""

    site: str = Field(description="site file, as in slurm/sites/")
    out: str = Field("runs", description="folder that will hold run folders; must be shared by the nodes")
    recipe: str = Field("", description="also check what this recipe needs: shards and initial weights")
