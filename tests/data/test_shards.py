"""The reading side: folds as index sets, errors in one line, and the two libraries that read the tars."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types

from jmt_dist.config import FoldOptions, PackOptions
from jmt_dist.data.pack import pack
from jmt_dist.data.sample import key, parse_key
from jmt_dist.data.shards import ShardSet, fold_shards, open_shards
from jmt_dist.data.tars import parse_index
from jmt_dist.errors import UserError
from jmt_dist.recipe import build, word_layer

FOLDS = FoldOptions()
NAMES = ("official", "fold-1", "fold-2", "fold-3", "fold-4", "fold-5")
TRAIN, VALIDATION = {"a1", "b.2", "video3", "d4", "e5"}, {"v6", "v7"}


def units(shards: ShardSet) -> Counter[str]:
    return Counter(parse_key(entry.key)[0] for index in shards.indexes for entry in parse_index(index.read_text()))


def test_official_parts_are_the_dataset_s_own_and_test_is_everywhere(packed: Path) -> None:
    assert units(fold_shards(packed, FOLDS, "official", "train")) == Counter({"a1": 8, "b.2": 4, "video3": 4, "d4": 4, "e5": 4})
    assert units(fold_shards(packed, FOLDS, "official", "validation")) == Counter({"v6": 4, "v7": 4})
    for fold in NAMES:
        assert units(fold_shards(packed, FOLDS, fold, "test")) == Counter({"t8": 4})


def test_every_fold_divides_all_annotated_samples_and_the_five_parts_divide_the_units(packed: Path) -> None:
    seen: set[str] = set()
    for fold in NAMES[1:]:
        train, validation = (units(fold_shards(packed, FOLDS, fold, part)) for part in ("train", "validation"))  # type: ignore[arg-type]
        assert not train.keys() & validation.keys() and not validation.keys() & seen
        assert train + validation == Counter({**dict.fromkeys(TRAIN | VALIDATION, 4), "a1": 8})
        seen |= validation.keys()
    assert seen == TRAIN | VALIDATION


def test_a_shard_set_names_only_tars_with_a_sample_of_it(packed: Path) -> None:
    for fold in NAMES:
        found = fold_shards(packed, FOLDS, fold, "validation")
        assert [tar.stem for tar in found.tars] == [index.stem for index in found.indexes]
        assert all(tar.is_file() for tar in found.tars)
        counts = [len(parse_index(index.read_text())) for index in found.indexes]
        assert min(counts) > 0 and sum(counts) == found.samples


def test_hashes_name_the_content_and_not_the_place(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "elsewhere")
    here, there = (fold_shards(folder, FOLDS, "fold-1", "train") for folder in (packed, tmp_path / "elsewhere"))
    assert (here.manifest_hash, here.index_hash) == (there.manifest_hash, there.index_hash)
    others = [fold_shards(packed, FOLDS, fold, "train").index_hash for fold in NAMES]
    assert len(set(others)) == len(NAMES)
    manifest = tmp_path / "elsewhere" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["shards"][1]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(data))
    assert open_shards(tmp_path / "elsewhere").hash != open_shards(packed).hash


def spoil(folder: Path, what: str) -> None:
    path = folder / "manifest.json"
    data: dict[str, Any] = json.loads(path.read_text())
    if what == "geometry":
        data["geometry"]["strip"] = 64
    elif what == "version":
        data["version"] = 2
    elif what == "fields":
        del data["units"][0]["rows"]
    path.write_text("{" if what == "json" else json.dumps(data))
    if what == "nothing":
        path.unlink()
    if what == "tar":
        (folder / "00002.tar").unlink()


@pytest.mark.parametrize(
    ("what", "message", "remedy"),
    [
        ("geometry", r"another geometry \(strip\)", "new folder"),
        ("version", "version 2, not 1", "new folder"),
        ("json", "cannot be read as a manifest", "new folder"),
        ("fields", "cannot be read as a manifest", "new folder"),
        ("nothing", "has no manifest.json", "pack_shards.py source="),
        ("tar", "00002.tar is missing", "pack_shards.py source=/"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(packed: Path, tmp_path: Path, what: str, message: str, remedy: str) -> None:
    shutil.copytree(packed, tmp_path / "s")
    spoil(tmp_path / "s", what)
    with pytest.raises(UserError, match=message) as error:
        fold_shards(tmp_path / "s", FOLDS, "official", "train")
    assert remedy in error.value.remedy and "\n" not in str(error.value)


def test_what_is_not_there_is_named(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no shard folder.*pack_shards\.py source=<dataset> out="):
        open_shards(tmp_path / "none")
    with pytest.raises(UserError, match=r"no fold `fold-6`.*official, fold-1, fold-2"):
        fold_shards(packed, FOLDS, "fold-6", "train")
    with pytest.raises(UserError, match=r"folds train-only with seed 5 .*\(there: train\+validation-0\)") as error:
        fold_shards(packed, FoldOptions(policy="train-only", seed=5), "official", "train")
    assert "source=/" in error.value.remedy and error.value.remedy.endswith("folds.policy=train-only folds.seed=5")


def test_the_command_that_makes_a_lost_tar_again_can_be_pasted_and_does_it(tree: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "Aff Wild's", tmp_path / "my shards"
    shutil.copytree(tree, source, copy_function=os.link)
    pack(PackOptions(source=str(source), out=str(out), audio="flac", samples_per_shard=8, workers=1), say=lambda line: None)
    lost = out / "00003.tar"
    lost.unlink()
    with pytest.raises(UserError, match=r"00003\.tar is missing") as error:
        open_shards(out)
    program, script, *words = shlex.split(error.value.remedy.removeprefix("Pack what is missing: "))
    assert (program, script) == ("python", "shards/pack_shards.py")
    pack(build(PackOptions, [word_layer(word) for word in words]), say=lambda line: None)
    assert lost.is_file() and open_shards(out).options["audio"] == "flac"


def test_an_empty_part_is_an_error(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "folds" / "train+validation-0" / "test")
    with pytest.raises(UserError, match=r"test part of fold `official` .* has no sample"):
        fold_shards(tmp_path / "s", FOLDS, "official", "test")


def test_the_webdataset_library_reads_every_sample(packed: Path) -> None:
    import webdataset

    manifest = open_shards(packed)
    found = {}
    for sample in webdataset.WebDataset([str(p) for p in sorted(packed.glob("*.tar"))], shardshuffle=False, nodesplitter=None):
        assert {name for name in sample if not name.startswith("__")} == {
            "strip.jpg", "audio.wav", "ends.i32", "va.f32", "present.u8", "id.i32"
        }  # fmt: skip
        found[sample["__key__"]] = np.frombuffer(sample["id.i32"], "<i4").tolist()
    assert len(found) == manifest.samples == 36
    for name, (index, m, p, _) in found.items():
        assert name == key(manifest.units[index].name, m, p)


def test_dali_reads_exactly_the_samples_of_a_fold_s_index(packed: Path) -> None:
    shards = fold_shards(packed, FOLDS, "fold-2", "validation")

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read() -> Any:
        strips, ids = fn.readers.webdataset(
            paths=[str(p) for p in shards.tars],
            index_paths=[str(p) for p in shards.indexes],
            ext=["strip.jpg", "id.i32"],
            dtypes=[types.UINT8, types.INT32],
            missing_component_behavior="error",
            name="reader",
        )
        return fn.decoders.image(strips, device="cpu"), ids

    pipe = read()
    pipe.build()
    assert pipe.reader_meta("reader")["epoch_size"] == shards.samples
    manifest, found = open_shards(packed), Counter[str]()
    for _ in range(shards.samples):
        image, ids = pipe.run()
        assert image.at(0).shape == (7952, 112, 3)
        found[manifest.units[int(ids.at(0)[0])].name] += 1
    assert found == units(shards)
