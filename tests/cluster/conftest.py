"""A shard folder as far as a submission looks at it, and a way to submit the toy job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jmt_dist.affwild2.folds import UnitSummary, make_folds, write_folds
from jmt_dist.config import FoldOptions
from jmt_dist.data.sample import GEOMETRY

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def write_shards(folder: Path, samples: int = 4) -> Path:
    """manifest, folds and index files of 12 units; the tar is empty, since no job here opens it."""
    folder.mkdir(parents=True)
    units = [UnitSummary(f"u{n:02d}", f"v{n:02d}", "validation" if n % 4 == 0 else "train", 256, (10,) * 25) for n in range(12)]
    packed = [{"name": u.name, "video": u.video, "split": u.split, "rows": 256, "valid": u.valid, "histogram": u.histogram} for u in units]
    shard = {"name": "00000.tar", "samples": 48, "bytes": 0, "sha256": "0" * 64}
    head = {"version": 1, "release": "test", "options": {}, "geometry": GEOMETRY, "units": packed, "shards": [shard]}
    (folder / "manifest.json").write_text(json.dumps(head))
    (folder / "00000.tar").write_bytes(b"")
    folds = make_folds(units, FoldOptions())
    base = folder / "folds" / "train+validation-0"
    for fold in folds.names:
        for part in ("train", "validation"):
            (base / fold / part).mkdir(parents=True)
            (base / fold / part / "00000.idx").write_text(f"v1.2 {samples}\n")
    write_folds(base / "folds.json", folds)
    return folder


class Workplace:
    """Recipe, site, shards and run folders of the tests; they share one MLflow file, which takes seconds to make."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.shards = write_shards(folder / "shards")
        self.recipe, self.site = folder / "recipe.yaml", folder / "site.yaml"
        self.recipe.write_text(f"name: toy\ndata: {{shards: {self.shards}}}\nvisual: {{weights: none}}\naudio: {{weights: none}}\n")
        self.site.write_text('name: here\nexecutor: local\ndevice: cpu\nparallel: 2\ntime: "00:05:00"\nsignal_seconds: 100\n')

    def out(self) -> Path:
        self.count += 1
        return self.folder / "runs" / f"run-{self.count}"

    def environment(self, **toy: Any) -> dict[str, str]:
        """`star` stands for every fold; underscores in a fold's name for hyphens."""
        names = {"star": "*"} | {f"fold_{n}": f"fold-{n}" for n in range(1, 6)}
        behaviour = {names.get(key, key): value for key, value in toy.items()}
        return {**os.environ, "TOY": json.dumps(behaviour), "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}", "MLFLOW_DISABLE_TELEMETRY": "true"}

    def start(self, out: Path, *words: str, home: str = "", **toy: Any) -> subprocess.Popen[str]:
        """`home`: a checkout whose code is submitted in the place of ours."""
        command = [sys.executable, str(HERE / "drive.py"), f"recipe={self.recipe}", f"site={self.site}", f"out={out}", *words]
        environment = self.environment(**toy)
        if home:
            environment |= {"PYTHONPATH": os.pathsep.join([home, environment["PYTHONPATH"]]), "PYTHONSAFEPATH": "1"}
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def submit(self, out: Path, *words: str, **toy: Any) -> tuple[int, str]:
        process = self.start(out, *words, **toy)
        try:
            text, _ = process.communicate(timeout=120)
        finally:
            if process.poll() is None:  # its jobs end with it
                process.kill()
        return process.returncode, text


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    yield Workplace(tmp_path_factory.mktemp("work"))


def starts(out: Path) -> list[dict[str, Any]]:
    """What the toy ranks noted, starts (with `from`) and ends (with `end`)."""
    path = out / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def attempts_of(out: Path, fold: str) -> list[tuple[str, str]]:
    entries = json.loads((out / fold / "attempts.json").read_text())["attempts"]
    return [(entry["outcome"], entry["reason"]) for entry in entries]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


CLUSTER = {"SLURM_MINICLUSTER_DIR": "/var/tmp/jmt-minicluster-tests", "SLURM_MINICLUSTER_PORT": "27817"}


def minicluster(name: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "slurm" / "minicluster" / name)]
    return subprocess.run(command, env={**os.environ, **CLUSTER}, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)


def system_files() -> dict[str, float]:
    """What a SLURM of the machine's own would have: nothing of it may change. Times of last change by path."""
    roots = [
        Path("/etc/slurm"),
        Path("/etc/munge"),
        Path("/var/lib/slurm"),
        Path("/var/spool/slurm"),
        Path("/var/lib/mysql"),
        Path("/run/munge"),
    ]
    return {str(path): path.lstat().st_mtime for root in roots for path in [root, *root.rglob("*")] if path.exists()}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    installed, before_it = shutil.which("slurmctld"), system_files()
    answer = minicluster("up")
    assert answer.returncode == 0 and all(line.startswith("minicluster: ") for line in answer.stderr.splitlines()), answer.stderr
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(Path(CLUSTER["SLURM_MINICLUSTER_DIR"]) / "etc" / "slurm.conf")
    yield Path(answer.stdout.strip())
    os.environ.pop("SLURM_CONF")
    if before is not None:
        os.environ["SLURM_CONF"] = before
    assert minicluster("down").returncode == 0
    assert not Path(CLUSTER["SLURM_MINICLUSTER_DIR"]).exists()
    left = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if CLUSTER["SLURM_MINICLUSTER_DIR"] in _words(path)]
    assert left == []
    assert not installed or system_files() == before_it


def _words(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""
