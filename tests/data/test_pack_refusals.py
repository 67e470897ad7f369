"""What packing refuses before it writes, in one sentence; a dry run and its estimate."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jmt_dist.data.pack import pack
from jmt_dist.errors import UserError

from . import tree as made
from .packing import contents, options, quiet

Break = Callable[[Path, Path, pytest.MonkeyPatch], dict[str, Any]]


def _foreign(tree: Path, out: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.doc").write_text("")
    return {}


def _no_space(tree: Path, out: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    shutil.rmtree(out)
    patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1_000_000))  # type: ignore[attr-defined]
    return {}


def _no_dataset(tree: Path, out: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    shutil.rmtree(out)
    return {"source": "/nowhere"}


def _other_source(tree: Path, out: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"source": str(tree.parent)}


REFUSED: dict[str, tuple[Break, str]] = {
    "other audio": (lambda t, o, p: {"audio": "flac"}, "was packed with audio=wav, not audio=flac"),
    "other seed": (lambda t, o, p: {"seed": 1}, "was packed with seed=0"),
    "other size": (lambda t, o, p: {"samples_per_shard": 9}, "samples_per_shard=8"),
    "other source": (_other_source, "was packed from"),
    "foreign folder": (_foreign, "holds files that are not shards"),
    "no space": (_no_space, "GB free"),
    "no dataset": (_no_dataset, "no folder /nowhere"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str, packed: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s"
    shutil.copytree(packed, out)
    change, message = REFUSED[what]
    changes = change(tree, out, monkeypatch)
    before = contents(out) if out.exists() else None
    with pytest.raises(UserError, match=message) as error:
        pack(options(tree, out, **changes), quiet)
    assert error.value.remedy and "\n" not in str(error.value)
    assert (contents(out) if out.exists() else None) == before


def test_the_dataset_is_left_as_it_was_shipped(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree / "batch1")
    for out in (tree / "shards", tmp_path / "link" / "shards"):
        with pytest.raises(UserError, match="lies in the dataset") as error:
            pack(options(tree, out), quiet)
        assert error.value.remedy and not out.exists()


def test_labels_without_crops_are_no_dataset(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "annotations", tmp_path / "annotations")
    with pytest.raises(UserError, match=r"no unit of .* can be packed; a1: it has no folder of face crops\."):
        pack(options(tmp_path, tmp_path.with_name(f"{tmp_path.name}-s")), quiet)


def test_two_packings_of_one_folder_are_refused(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="being packed by another process"):
        pack(options(tree, out), quiet)
    os.close(handle)


def test_a_dry_run_writes_nothing_and_says_what_it_would_take(tree: Path, tmp_path: Path) -> None:
    said: list[str] = []
    packed = pack(options(tree, tmp_path / "s", dry=True), said.append)
    assert packed.manifest is None and not (tmp_path / "s").exists()
    assert any("36 samples; about" in line and "GB of shards" in line for line in said)


def test_the_estimate_of_space_is_near_what_packing_takes(tmp_path: Path) -> None:
    from jmt_dist.affwild2.layout import find_dataset
    from jmt_dist.data.estimate import estimate

    for k in range(5):
        made.write_unit(tmp_path / "tree", f"u{k}", 256, k + 1)
    for audio in ("wav", "flac"):
        expected = estimate(find_dataset(tmp_path / "tree").units, audio, 1)  # type: ignore[arg-type]
        pack(options(tmp_path / "tree", tmp_path / audio, audio=audio), quiet)
        real = sum(path.stat().st_size for path in (tmp_path / audio).glob("*.tar"))
        assert expected.samples == 20 and 0.95 < expected.bytes / real < 1.3  # FLAC: the silence around a short unit is nearly free
        assert abs(expected.work - 5 * 2 * 256 / 30 * 44_100) < 100 and expected.seconds > 0


def test_too_few_videos_for_folds_is_an_error_before_pass_two(tmp_path: Path) -> None:
    for k in range(3):
        made.write_unit(tmp_path / "tree", f"u{k}", 20, k + 1)
    with pytest.raises(UserError, match="3 videos cannot be divided"):
        pack(options(tmp_path / "tree", tmp_path / "s"), quiet)
    assert not list((tmp_path / "s").glob("*.tar"))


def test_crops_that_may_not_be_read_stop_no_estimate(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(real: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def call(path: Path) -> Any:
            if path.parent.parent.name == "cropped_aligned":
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return call

    for name in ("read_bytes", "is_file"):
        monkeypatch.setattr(Path, name, closed(getattr(Path, name)))
    said: list[str] = []
    pack(options(tree, tmp_path / "s", dry=True), said.append)
    assert any("36 samples; about" in line for line in said)
