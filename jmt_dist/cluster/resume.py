"""Going on after a cancellation or a failure, from what a run folder itself says."""

from __future__ import annotations

from pathlib import Path

from jmt_dist.cluster import status, submit, sweep
from jmt_dist.cluster.control import SWEEP, read_jobs, runs_of
from jmt_dist.cluster.options import SubmitOptions, SweepOptions
from jmt_dist.cluster.plan import RUN_FOLD
from jmt_dist.cluster.share import has_folds
from jmt_dist.recipe import load_recipe, load_site


def resume(out: Path, wait: bool = False) -> int:
    """Submit again what is not done in a run folder or in a sweep's, with the recipes and the site it was submitted with."""
    out = out.expanduser().resolve()
    runs = status.read_json(out / SWEEP).get("variants", [])
    # on one machine a sweep's run folders get their jobs one after the other: the last that has some is the last that began
    begun = [run for run in runs_of(out) if (run / "jobs.json").exists()]
    jobs = read_jobs(begun[-1] if begun else out)
    folds = [str(fold) for fold in jobs.get("folds", [])]
    share = [str(folder) for folder in jobs.get("share", [])]
    left = [folder for folder in share if has_folds(Path(folder), folds)]
    for folder in (folder for folder in share if folder not in left):
        print(f"share={folder} is no longer there, or its folds are not: stages that were not linked from it yet are done here")
    if not runs:
        recipe, place = str(out / "recipe.yaml"), str(out / "site.yaml")
        options = SubmitOptions(recipe=recipe, site=place, out=str(out), folds=folds, share=left, wait=wait)
        return submit.submit(options, load_recipe(recipe), load_site(place))
    site = load_site(out / "site.yaml")
    recipes = {name: load_recipe(out / name / "recipe.yaml") for name in runs}
    again = SweepOptions(sweep="", site="", out=str(out), folds=folds, share=left, wait=wait)
    return sweep.submit_recipes(again, recipes, out, site, RUN_FOLD, sweep.COMPARE)
