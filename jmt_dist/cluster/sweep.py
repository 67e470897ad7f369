"""A sweep: variants of one recipe, each submitted to a run folder of its own."""

from __future__ import annotations

import re
from pathlib import Path

from jmt_dist.cluster import plan
from jmt_dist.cluster.options import SubmitOptions, SweepFile, SweepOptions
from jmt_dist.cluster.share import same_stages
from jmt_dist.config import Recipe, Site
from jmt_dist.errors import UsageError
from jmt_dist.program import FAILED, OK, OMISSIONS
from jmt_dist.recipe import build, load_recipe, parse_word, read_layers


def read_sweep(path: Path) -> SweepFile:
    """A sweep file; the recipe it names is relative to it. Raises UsageError, one line, for what cannot be understood."""
    sweep = build(SweepFile, read_layers(path))
    for name in sweep.variants:
        if not re.fullmatch(r"[\w.\-]+", name):
            raise UsageError(f"variant {name!r} of {path} cannot name a folder", "Use letters, digits, `-`, `_` and `.`.")
    return sweep.model_copy(update={"recipe": str(path.parent / sweep.recipe)})


def variants(path: Path, words: list[str]) -> dict[str, Recipe]:
    """The recipe of every variant: the sweep's recipe, the variant's words, then `words`, which all variants share.

    All are built before any is submitted, so that a mistake in the last one costs nothing. A variant is named
    `<recipe>-<variant>` unless its words name it.
    """
    sweep = read_sweep(path)
    recipes = {}
    for name, changes in sweep.variants.items():
        try:
            recipe = load_recipe(sweep.recipe, [*changes, *words])
        except UsageError as error:
            raise UsageError(f"variant `{name}` of {path}: {error.sentence}", error.remedy) from None
        named = any(parse_word(word)[0] == "name" for word in [*changes, *words])
        recipes[name] = recipe if named else recipe.model_copy(update={"name": f"{recipe.name}-{name}"})
    return recipes


def submit_sweep(options: SweepOptions, site: Site, words: list[str], function: str = plan.RUN_FOLD, compare: str = plan.COMPARE) -> int:
    """Submit every variant to `<out>/<variant>`, one after the other; 3 where some of them did not fully succeed, 1 where none did.

    Variants that differ in the fusion alone take their backbones and features from the first of them.
    """
    from jmt_dist.cluster.submit import submit

    path = Path(options.sweep)
    recipes = variants(path, words)
    out = Path(options.out or Path("runs") / path.stem)
    print(f"sweep {path}: {len(recipes)} variant(s): {', '.join(recipes)}", flush=True)
    codes: dict[str, int] = {}
    for name, recipe in recipes.items():
        earlier = tuple((out / other).resolve() for other in codes if same_stages(recipe, recipes[other]))
        print(f"\n== {name}", flush=True)
        one = SubmitOptions(recipe=str(path), site=options.site, out=str(out / name), folds=options.folds, dry=options.dry)
        codes[name] = submit(one, recipe, site, function, compare, share=earlier[:1])
    print()
    for name, code in codes.items():
        print(f"{name}: {({OK: 'done' if site.executor == 'local' else 'submitted', OMISSIONS: 'some folds failed'}).get(code, 'failed')}")
    print(out.resolve())
    if not any(codes.values()):
        return OK
    return FAILED if all(code == FAILED for code in codes.values()) else OMISSIONS
