"""Check a site: everything a job will need is tried from here, and each failure says what to do about it.

    python launch/check_site.py site=slurm/sites/mycluster.yaml
    python launch/check_site.py site=slurm/sites/local.yaml recipe=launch/recipes/paper.yaml

Run it on the login node first and then, through srun, on a compute node. Words with `site.` before them change the site.
"""

from __future__ import annotations

from jmt_dist.cluster.options import CheckOptions
from jmt_dist.config import Site
from jmt_dist.errors import UsageError
from jmt_dist.program import run
from jmt_dist.recipe import build, load_recipe, load_site, split_words, word_layer


def main(words: list[str]) -> int:
    """Run the checks; 1 where one of them failed."""
    own, site_words, recipe_words = split_words(words, CheckOptions)
    options = build(CheckOptions, [word_layer(word) for word in own])
    if recipe_words and not options.recipe:
        raise UsageError(f"`{recipe_words[0]}` changes a recipe, and none is checked", "Name it: recipe=launch/recipes/….")
    site = load_site(options.site, site_words)
    recipe = load_recipe(options.recipe, recipe_words) if options.recipe else None
    from jmt_dist.cluster.site_check import check_site

    return check_site(options, site, recipe)


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", CheckOptions), ("Site", "site.", Site)])
