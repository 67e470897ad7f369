"""Submit several variants of a recipe: each gets a run folder <out>/<variant> and is submitted like submit_folds.py would.

    python launch/submit_sweep.py sweep=launch/recipes/ablation.yaml site=slurm/sites/local.yaml out=runs/ablation

A sweep file holds `recipe:` (a recipe file, relative to the sweep file) and `variants:`, a list of words for each name:

    recipe: demo.yaml
    variants:
      jmt: []
      concat: [fusion.model=concat, "fusion.baselines=[]"]

Further words change the recipe of every variant or, with `site.` before them, the site. The same command again goes on.
"""

from __future__ import annotations

from jmt_dist.cluster.options import SweepOptions
from jmt_dist.config import Recipe, Site
from jmt_dist.program import run
from jmt_dist.recipe import build, load_site, split_words, word_layer


def main(words: list[str]) -> int:
    """Build every variant, then submit them in order."""
    own, site_words, recipe_words = split_words(words, SweepOptions)
    options = build(SweepOptions, [word_layer(word) for word in own])
    site = load_site(options.site, site_words)
    from jmt_dist.cluster.sweep import submit_sweep

    return submit_sweep(options, site, recipe_words)


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", SweepOptions), ("Recipe", "", Recipe), ("Site", "site.", Site)])
