"""Show one sample of a shard folder: members, labels, and a contact sheet as PNG.

python shards/show_sample.py shards-affwild2
python shards/show_sample.py shards=shards-affwild2 key=video59_right-0003-2 offset=0 out=sheet.png

A row of the sheet is one clip: eight frames with their source frame, its spectrogram, its label. Below: the labels and the
sound of the whole sample over time, with the ends of the clips.
"""

from __future__ import annotations

from jmt_dist.config import ShowOptions
from jmt_dist.program import run


def main(words: list[str]) -> None:
    """Show what the words ask for."""
    from pathlib import Path

    from jmt_dist.data.shards import open_shards
    from jmt_dist.data.show import contact_sheet, describe, load_sample, write_sheet
    from jmt_dist.recipe import build, word_layer

    options = build(ShowOptions, [word_layer(word) for word in words])
    manifest = open_shards(Path(options.shards))
    tar, entry, sample = load_sample(manifest, options.key)
    for line in describe(manifest, tar, entry, sample, options.offset):
        print(line)
    path = Path(options.out or f"{entry.key}.png")
    write_sheet(contact_sheet(entry, sample, options.offset), path)
    if manifest.release != "fixture":
        print("The sheet shows people of the dataset: its licence forbids sharing it.")
    print(path)


if __name__ == "__main__":
    run(main, __doc__, [("Options", "", ShowOptions)])
