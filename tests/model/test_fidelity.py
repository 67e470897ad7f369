"""docs/fidelity.md names files and tests that exist, a test in every row, and every defect."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`]+)`", PAGE)


def rows() -> list[str]:
    """Rows of all tables, without heads and rules."""
    lines = PAGE.splitlines()
    return [line for i, line in enumerate(lines) if line.startswith("| ") and not lines[i + 1].startswith("|---")]


def test_every_path_exists() -> None:
    paths = {word.split("::")[0] for word in QUOTED if "/" in word}
    assert len(paths) > 25
    assert not [path for path in sorted(paths) if not (ROOT / path).is_file()]


def test_every_test_exists() -> None:
    named = {tuple(word.split("::")) for word in QUOTED if "::" in word}
    assert len(named) > 45
    have = {path: {node.name for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}
            for path in {path for path, _ in named}}  # fmt: skip
    assert not [f"{path}::{test}" for path, test in sorted(named) if test not in have[path]]


def test_every_row_names_a_test() -> None:
    assert len(rows()) > 45
    assert not [row for row in rows() if not re.search(r"`tests/[\w/]+\.py::test_\w+`", row)]


def test_every_known_defect_is_listed() -> None:
    assert [int(n) for n in re.findall(r"^\| (\d+)\. ", PAGE, re.MULTILINE)] == list(range(1, 16))
