"""Pack Aff-Wild2, as its owners ship it, into WebDataset shards with fold indexes.

    python shards/pack_shards.py source=/data/affwild2 out=shards-affwild2 workers=16
    python shards/pack_shards.py source=/data/affwild2 out=shards-affwild2 dry=true
    python shards/pack_shards.py source=/data/affwild2 out=shards-affwild2 workers=16 site=slurm/sites/mycluster.yaml

Run again after an interruption: only what is missing is made. Run with other folds.policy or folds.seed on a
packed folder: only index files are added. Units that cannot be packed are left out and listed (exit code 3).
With site=…, both passes are job arrays of site.parallel tasks with `workers` processes each; the bytes are the same. Their logs and
code lie in <out>.jobs beside the shards, until they are packed; after wait=false, until this command is given again.
"""

from __future__ import annotations

from jmt_dist.config import PackOptions, Site
from jmt_dist.errors import UsageError
from jmt_dist.program import OK, OMISSIONS, run


def main(words: list[str]) -> int:
    """Pack as the words say."""
    from jmt_dist.data.pack import pack
    from jmt_dist.recipe import build, load_site, word_layer

    site_words = [word.removeprefix("site.") for word in words if word.startswith("site.")]
    options = build(PackOptions, [word_layer(word) for word in words if not word.startswith("site.")])
    site = load_site(options.site, site_words)
    if site_words and not options.site:
        raise UsageError(f"`site.{site_words[0]}` without a site", "Give site=slurm/sites/….yaml too.")
    if options.site and not options.dry and not _in_jobs(options, site):
        print(f"submitted: the same command, or a look into {options.out}, says when it is packed")
        return OK
    packed = pack(options)
    if packed.manifest is None:
        print("dry run: nothing written")
        return OK
    print(packed.manifest.folder)
    return OMISSIONS if packed.report is not None and packed.report.omitted else OK


def _in_jobs(options: PackOptions, site: Site) -> bool:
    """Pack by the jobs of a site; whether they have ended. What is left for `pack` is to say what was packed."""
    from pathlib import Path

    from jmt_dist.cluster.array import forget_steps, run_steps
    from jmt_dist.data.pack_guard import disk_errors
    from jmt_dist.data.pack_part import plan_parts

    out = Path(options.out).resolve()
    jobs = out.with_name(f"{out.name}.jobs")  # beside the shards, which are for everyone: it is private and holds pickles
    steps = plan_parts(options.model_copy(update={"source": str(Path(options.source).resolve()), "out": str(out)}), site.parallel)
    with disk_errors(jobs):
        if not steps:
            forget_steps(jobs)
        return not steps or run_steps(site, jobs, "pack", options.workers, steps, options.wait)


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", PackOptions), ("Site, only with site=…", "site.", Site)])
