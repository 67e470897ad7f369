"""README, section "Packing Aff-Wild2", done as it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from .packing import contents

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Packing Aff-Wild2\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert section
    return [line.split("   #")[0].rstrip() for line in section[1].splitlines() if line.startswith("python ")]


def run(command: str, tree: Path, work: Path) -> subprocess.CompletedProcess[str]:
    text = command.replace("/data/Aff-Wild2", str(tree)).replace("/data/shards", str(work / "shards")).replace("runs/", f"{work}/")
    text = text.replace("sheet.png", str(work / "sheet.png")).replace("mycluster.yaml site.parallel=8", "local.yaml site.parallel=2")
    words = shlex.split(text.replace("--workers 16", "--workers 2"))
    return subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_packing_as_the_readme_says(tree: Path, tmp_path: Path) -> None:
    dry, pack, verify, show, cluster, *rest = commands()
    done = run(dry, tree, tmp_path)
    assert done.returncode == 0 and "dry run: nothing written" in done.stdout and not (tmp_path / "shards").exists(), done.stderr
    done = run(pack, tree, tmp_path)
    assert done.returncode == 0 and "Packed release unknown (5 train / 2 validation / 1 test units" in done.stdout, done.stderr
    done = run(verify, tree, tmp_path)
    assert done.returncode == 0 and "36 samples verified, 36 compared" in done.stdout, done.stderr
    done = run(show, tree, tmp_path)
    assert done.returncode == 0 and (tmp_path / "sheet.png").is_file(), done.stderr
    here = {name: value for name, value in contents(tmp_path / "shards").items() if name.endswith(".tar")}
    (tmp_path / "shards").rename(tmp_path / "first")
    done = run(cluster, tree, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {name: value for name, value in contents(tmp_path / "shards").items() if name.endswith(".tar")} == here
    assert [command.split()[1] for command in rest] == ["shards/make_fixture.py", "shards/pack_shards.py"]  # test_pack does these
