"""Tars and indexes against GNU tar's, DALI's and Python's own readers."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import wds2idx

from jmt_dist.data.tars import Entry, ShardWriter, index_text, parse_index, read_entry, scan_tar


def write(path: Path, count: int = 5) -> list[Entry]:
    rng = np.random.default_rng(count)
    with ShardWriter(path) as writer:
        for k in range(count):
            writer.add(f"unit{k}%2E1-0000-{k % 4}", [("strip.jpg", rng.bytes(511 + k)), ("va.f32", rng.bytes(512)), ("e", b"")])
    assert writer.size == path.stat().st_size and len(writer.entries) == count
    return writer.entries


def test_index_equals_that_of_nvidias_tool(tmp_path: Path) -> None:
    entries = write(tmp_path / "a.tar")
    with wds2idx.IndexCreator(str(tmp_path / "a.tar"), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "theirs.idx").read_text() == index_text(entries)


def test_bytes_depend_on_content_alone_and_the_hash_is_of_the_file(tmp_path: Path) -> None:
    import hashlib

    for name in ("a.tar", "b.tar"):
        write(tmp_path / name)
    data = (tmp_path / "a.tar").read_bytes()
    assert data == (tmp_path / "b.tar").read_bytes() and len(data) % 10_240 == 0
    with ShardWriter(tmp_path / "c.tar") as writer:
        writer.add("x", [("y", b"z")])
    assert writer.sha256 == hashlib.sha256((tmp_path / "c.tar").read_bytes()).hexdigest()


def test_other_tars_read_it(tmp_path: Path) -> None:
    entries = write(tmp_path / "a.tar")
    names = [f"{entry.key}.{extension}" for entry in entries for extension, _, _ in entry.members]
    listed = subprocess.run(["tar", "--list", "--file", tmp_path / "a.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == names
    with tarfile.open(tmp_path / "a.tar") as tar, (tmp_path / "a.tar").open("rb") as file:
        for entry in entries:
            for extension, data in read_entry(file, entry).items():
                member = tar.getmember(f"{entry.key}.{extension}")
                found = tar.extractfile(member)
                assert found is not None and found.read() == data
                assert (member.uid, member.gid, member.mtime, member.uname) == (0, 0, 0, "")


def test_index_and_tar_are_read_back(tmp_path: Path) -> None:
    entries = write(tmp_path / "a.tar")
    assert parse_index(index_text(entries)) == entries == scan_tar(tmp_path / "a.tar")
    assert parse_index(index_text(entries[3:1:-1])) == entries[3:1:-1]


WRONG = ("", "v1.1 0\n", "v1.2 2\na 1 2 k.a\n", "v1.2 1\na 1 2\n", "v1.2 1\na 1 2 k.a b 3 4 l.b\n", "v1.2 1\na x 2 k.a\n")


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_index_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"line|int"):
        parse_index(text)


def test_a_cut_or_foreign_tar_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:1500])
    (tmp_path / "end.tar").write_bytes(data[:-5000])
    (tmp_path / "text.tar").write_text("hello " * 500)
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x.y")
        info.pax_headers = {"comment": "more than USTAR"}
        tar.addfile(info)
    for name, message in (("cut.tar", "not a tar"), ("end.tar", "not a tar"), ("text.tar", "not a tar"), ("pax.tar", "extended header")):
        with pytest.raises(ValueError, match=message):
            scan_tar(tmp_path / name)


def test_a_name_too_long_for_ustar_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name is too long"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("x" * 120, [("y", b"")])
