"""The example of shards/README.md, run as it stands there: any shard opens with plain `webdataset`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmt_dist.data.sample import Sample, decode_audio
from jmt_dist.data.strip import decode
from jmt_dist.data.tars import parse_index, read_entry

README = Path(__file__).parents[2] / "shards" / "README.md"


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    found = [block for block in blocks if "wds.WebDataset(" in block]
    assert len(found) == 1
    return found[0]


def test_the_example_reads_what_the_contract_says(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(packed.parent)
    code = example().replace("shards-affwild2/", f"{packed.name}/").replace("{00000..00233}", "{00000..00004}")
    assert "{00000..00004}" in code
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)  # runs to the end: the example prints the last sample's clips
    read = names["sample"]
    with (packed / "00004.tar").open("rb") as file:
        last = Sample.from_members(read_entry(file, parse_index((packed / "00004.idx").read_text())[-1]))
    assert names["count"] == 36
    assert np.array_equal(names["frames"].reshape(-1, 112, 3), np.asarray(decode(last.strip)))
    assert np.array_equal(read["va.f32"], last.va, equal_nan=True) and np.array_equal(read["ends.i32"], last.ends)
    audio = decode_audio(last.audio, "wav")
    assert np.array_equal(names["window"], audio[last.ends[-1] - 47_040 : last.ends[-1]])
    assert read["__key__"] in capsys.readouterr().out
