"""Write a synthetic Aff-Wild2: drawn faces and made voices in the layout of the real dataset, free of its licence.

Example: python shards/make_fixture.py out=fixture units=24 rows=256
"""

from __future__ import annotations

from jmt_dist.config import FixtureOptions
from jmt_dist.program import run


def main(words: list[str]) -> int:
    """Print the plan, write the fixture, print its ceilings and its path."""
    import os

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy's own threads would only get in the way of the workers
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from jmt_dist.affwild2.fixture import make_fixture, plan_fixture
    from jmt_dist.data.report import printable
    from jmt_dist.recipe import build, word_layer

    options = build(FixtureOptions, [word_layer(word) for word in words])
    videos = plan_fixture(options)
    units = [unit for video in videos for unit in video.people]
    crops = sum(video.frames * len(video.people) for video in videos)
    count = {split: sum(unit.split == split for unit in units) for split in ("train", "validation", "test")}
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"fixture: {len(units)} units ({count['train']} train, {count['validation']} validation, {count['test']} test; "
        f"{sum(bool(unit.gotcha) for unit in units)} of them irregular) in {len(videos)} videos, {crops} crops, "
        f"about {crops * 13 // 2000} MB, seed {options.seed} -> {options.out}"
    )
    columns = (TextColumn("videos"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(videos))

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, description=printable(name))
            if not console.is_terminal and (done % 10 == 0 or done == total):
                print(f"{done}/{total} videos", flush=True)

        report = make_fixture(options, show)
    if not report.made:
        console.print("complete already, with the same options: nothing to do")
    console.print("highest CCC that can be read from   valence  arousal  average")
    for name, shown in (("visual", "the face"), ("audio", "the voice"), ("both", "both")):
        line = report.ceiling[name]
        console.print(f"  {shown:<32}   {line['valence']:7.3f}  {line['arousal']:7.3f}  {line['average']:7.3f}")
    console.print(str(report.out))
    return 0


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", FixtureOptions)])
