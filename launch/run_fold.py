"""Run one fold in this process: one rank, or one of several where torchrun or srun has set RANK and its companions.

    python launch/run_fold.py recipe=launch/recipes/demo.yaml site=slurm/sites/local.yaml fold=official out=runs/demo
    torchrun --nproc-per-node 2 launch/run_fold.py recipe=… site=… fold=fold-1 out=runs/demo 'stages=[fusion]'

Ctrl-C, SIGTERM and SIGUSR2 let it save and stop; the same command goes on from there.
"""

from __future__ import annotations

from jmt_dist.cluster.options import RunFoldOptions
from jmt_dist.config import Recipe, Site
from jmt_dist.program import run
from jmt_dist.recipe import build, load_recipe, load_site, split_words, word_layer


def main(words: list[str]) -> int:
    """Run the fold's stages; 1 where it was asked to stop before the end."""
    own, site_words, recipe_words = split_words(words, RunFoldOptions)
    options = build(RunFoldOptions, [word_layer(word) for word in own])
    recipe, site = load_recipe(options.recipe, recipe_words), load_site(options.site, site_words)
    from jmt_dist.cluster.single import run_single

    return run_single(options, recipe, site)


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", RunFoldOptions), ("Recipe", "", Recipe), ("Site", "site.", Site)])
