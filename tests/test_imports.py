"""Imports run one way (DESIGN section 3): programs -> cluster -> train, report -> evaluate, data -> model, track -> affwild2, config."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "jmt_dist"
BOTTOM = ("errors", "config", "recipe", "program")  # each may import those before it
BELOW = {  # room: the rooms it may import, besides itself and the bottom
    "affwild2": set(),
    "model": {"affwild2"},
    "track": {"affwild2"},
    "evaluate": {"affwild2", "model", "track"},
    "data": {"affwild2", "model", "track"},
    "report": {"affwild2", "track", "evaluate", "data"},
    "train": {"affwild2", "model", "track", "evaluate", "data"},
    "cluster": {"affwild2", "track"},
}
INSIDE_FUNCTIONS = {"cluster": {"train", "evaluate", "data", "model", "report"}}  # submission answers before any of these is loaded
EVERYWHERE = ("data.geometry", "data.sound")  # arithmetic alone: the one definition of clip, sample and spectrogram for every room
WITHOUT_TORCH = ("errors", "config", "recipe", "program", "data.geometry", "track", "cluster")


@dataclass(frozen=True)
class Import:
    """`module` imports `target` (names without the package) at `line`; `late` = inside a function."""

    module: str
    target: str
    line: int
    late: bool


def sources() -> dict[str, Path]:
    """Module name without the package ("" is the package itself) to file."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, tree: ast.Module, modules: set[str]) -> Iterator[Import]:
    """All imports of jmt_dist modules and of other packages; names imported from a module resolve to it."""

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, child.lineno, late)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}: imports are absolute"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    is_module = whole.startswith(f"{PACKAGE}.") and whole.removeprefix(f"{PACKAGE}.") in modules
                    yield Import(module, whole if is_module else str(child.module), child.lineno, late)
            yield from visit(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from visit(tree, False)


def own_imports(files: dict[str, Path]) -> list[Import]:
    """Imports among the modules of the package."""
    every = [i for module, path in files.items() for i in imports_of(module, ast.parse(path.read_text("utf-8")), set(files))]
    inside = [i for i in every if i.target == PACKAGE or i.target.startswith(f"{PACKAGE}.")]
    return [Import(i.module, i.target.removeprefix(PACKAGE).removeprefix("."), i.line, i.late) for i in inside]


def offences(imports: list[Import]) -> list[str]:
    """What breaks the direction, one line each."""
    found = []
    for i in imports:
        room, below = i.module.split(".")[0], i.target.split(".")[0]
        if not room:
            allowed = False
        elif room == below or i.target in ("", *EVERYWHERE):  # "": the package itself, which imports nothing
            allowed = True
        elif room in BOTTOM:
            allowed = below in BOTTOM[: BOTTOM.index(room)]
        elif below in BOTTOM:
            allowed = True
        else:
            allowed = below in BELOW.get(room, set()) or (i.late and below in INSIDE_FUNCTIONS.get(room, set()))
        if not allowed:
            found.append(f"{i.module}, line {i.line}, imports {i.target}")
    return found


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Every cycle that a depth-first walk closes."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(edges.get(module, ())):
                walk(target, [*path, module])
            done.add(module)

    for module in sorted(edges):
        walk(module, [])
    return found


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return own_imports(sources())


def test_every_room_has_its_place() -> None:
    """A new room or top-level module must be given one here."""
    assert {module.split(".")[0] for module in sources() if module} == {*BOTTOM, *BELOW}


def test_imports_run_one_way(imports: list[Import]) -> None:
    assert len(imports) > 50  # the walk sees the package
    assert offences(imports) == []


def test_no_module_imports_itself_by_way_of_others(imports: list[Import]) -> None:
    edges: dict[str, set[str]] = {}
    for i in imports:
        edges.setdefault(i.module, set()).add(i.target)
    assert cycles(edges) == []


def test_cluster_names_torch_only_inside_functions() -> None:
    for module, path in sources().items():
        if module.split(".")[0] == "cluster":
            early = [i.target for i in imports_of(module, ast.parse(path.read_text("utf-8")), set()) if not i.late]
            assert not {"torch", "deepspeed", "nvidia"} & {target.split(".")[0] for target in early}, module


def test_modules_that_must_answer_at_once_load_no_torch() -> None:
    """In a fresh interpreter, so also by way of what they import."""
    modules = [m for m in sources() if any(m == name or m.startswith(f"{name}.") for name in WITHOUT_TORCH)]
    assert "cluster.job" in modules and "data.geometry" in modules
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = sorted({'torch', 'deepspeed', 'nvidia.dali'} & set(sys.modules))\n"
        "    if heavy:\n"
        "        sys.exit(f'{name} loads {heavy}')\n"
    )
    names = [f"{PACKAGE}.{m}" for m in modules]
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def programs() -> list[Path]:
    return [path for folder in ("launch", "shards", "slurm") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", programs(), ids=lambda path: path.name)
def test_programs_are_scripts_that_import_little(path: Path) -> None:
    """`--help` answers at once: heavy packages are imported inside main. And a program is never imported by the package."""
    tree = ast.parse(path.read_text("utf-8"))
    heavy = {"torch", "deepspeed", "nvidia", "mlflow", "rich", "numpy", "scipy", "av"}
    early = {i.target.split(".")[0] for i in imports_of(path.stem, tree, set()) if not i.late}
    assert not heavy & early
    assert path.name.count("_") == 1, "program names are two words"
    assert any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


def test_what_a_person_runs_is_no_package() -> None:
    assert programs()
    for folder in ("launch", "shards", "slurm", "benchmarks"):
        assert not list((ROOT / folder).rglob("__init__.py"))


# ---- the checks themselves


def parsed(module: str, text: str) -> list[Import]:
    modules = {"affwild2.layout", "train", "train.fold", "config", "cluster.job", "data.geometry"}
    found = imports_of(module, ast.parse(text), modules)
    return [Import(i.module, i.target.removeprefix(PACKAGE).removeprefix("."), i.line, i.late) for i in found]


@pytest.mark.parametrize(
    ("module", "text", "broken"),
    [
        ("affwild2.layout", "from jmt_dist.train import fold", True),
        ("affwild2.layout", "import jmt_dist.train.fold", True),
        ("affwild2.layout", "def f():\n    from jmt_dist.train.fold import run_fold", True),
        ("affwild2.layout", "from jmt_dist.config import Recipe", False),
        ("affwild2.layout", "from jmt_dist.data.geometry import RATE", False),
        ("affwild2.layout", "from jmt_dist.data import geometry", False),
        ("config", "from jmt_dist.recipe import build", True),
        ("cluster.job", "from jmt_dist.train.fold import run_fold", True),
        ("cluster.job", "if True:\n    from jmt_dist.train.fold import run_fold", True),
        ("cluster.job", "class Job:\n    def __call__(self):\n        from jmt_dist.train.fold import run_fold", False),
        ("cluster.job", "from jmt_dist.data.shards import open_shards", True),
        ("cluster.job", "import jmt_dist", False),
        ("", "from jmt_dist.config import Recipe", True),
        ("train.fold", "from jmt_dist.cluster.job import Job", True),
        ("model.zoo", "from jmt_dist.track.spool import Spool", True),
    ],
)
def test_the_direction_check_finds(module: str, text: str, broken: bool) -> None:
    assert bool(offences(parsed(module, text))) is broken


def test_the_cycle_check_finds() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}}) == []
    assert cycles({"a": {"a"}}) == [["a", "a"]]


def test_the_torch_check_finds() -> None:
    pytest.importorskip("torch", reason="nothing to find without torch")
    program = "import sys, jmt_dist.train.ccc\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, env=os.environ).returncode == 1
