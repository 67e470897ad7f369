"""Submit a recipe's folds to a site: run them here (site.executor=local), or as one SLURM job array.

    python launch/submit_folds.py recipe=launch/recipes/demo.yaml site=slurm/sites/local.yaml out=runs/demo
    python launch/submit_folds.py recipe=launch/recipes/paper.yaml site=slurm/sites/mycluster.yaml 'folds=[official,fold-1]' dry=true

Further words change the recipe (`fusion.batch=4`) or, with `site.` before them, the site (`site.parallel=1`).
The same command again goes on where it stopped: folds that are done are skipped, others resume from their checkpoints.
"""

from __future__ import annotations

from jmt_dist.cluster.options import SubmitOptions
from jmt_dist.config import Recipe, Site
from jmt_dist.program import run
from jmt_dist.recipe import build, load_recipe, load_site, split_words, word_layer


def main(words: list[str]) -> int:
    """Check, copy the code, create the runs, submit."""
    own, site_words, recipe_words = split_words(words, SubmitOptions)
    options = build(SubmitOptions, [word_layer(word) for word in own])
    recipe, site = load_recipe(options.recipe, recipe_words), load_site(options.site, site_words)
    from jmt_dist.cluster.submit import submit

    return submit(options, recipe, site)


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", SubmitOptions), ("Recipe", "", Recipe), ("Site", "site.", Site)])
