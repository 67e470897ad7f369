"""Go on with a run folder or a sweep after a cancellation or a failure: submit what is not done, from its checkpoints.

    python launch/resume_jobs.py out=runs/demo

Recipe and site are those of the last submission (recipe.yaml and site.yaml of the folder); the code is that of this checkout.
The command that submitted it does the same, and can change the recipe or the site.
"""

from __future__ import annotations

from pathlib import Path

from jmt_dist.cluster.options import ResumeOptions
from jmt_dist.program import run
from jmt_dist.recipe import build, word_layer


def main(words: list[str]) -> int:
    """Submit again."""
    options = build(ResumeOptions, [word_layer(word) for word in words])
    from jmt_dist.cluster.resume import resume

    return resume(Path(options.out), options.wait)


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", ResumeOptions)])
