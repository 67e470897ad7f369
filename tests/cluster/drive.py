"""submit_folds.py with the toy job in place of training: everything else is the program's own."""

from __future__ import annotations

import os
import sys

from jmt_dist.cluster import tracking
from jmt_dist.cluster.options import SubmitOptions
from jmt_dist.cluster.submit import submit
from jmt_dist.program import run
from jmt_dist.recipe import build, load_recipe, load_site, split_words, word_layer


def main(words: list[str]) -> int:
    own, site_words, recipe_words = split_words(words, SubmitOptions)
    options = build(SubmitOptions, [word_layer(word) for word in own])
    recipe, site = load_recipe(options.recipe, recipe_words), load_site(options.site, site_words)
    if not os.environ.get("TOY_TRACKING"):  # MLflow costs seconds per submission; one test has it
        tracking.prepare = lambda *_: None
    return submit(options, recipe, site, os.environ.get("TOY_FUNCTION", "toyjob:run_fold"), os.environ.get("TOY_COMPARE", "toyjob:compare"))


if __name__ == "__main__":
    run(main, "", [])
    sys.exit(1)
