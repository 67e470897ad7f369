"""A copy of the code at submission: jobs run it, so that editing the checkout later changes nothing."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import jmt_dist
from jmt_dist.cluster.status import now, write_json
from jmt_dist.errors import UserError


@dataclass(frozen=True)
class Snapshot:
    """Where the copy lies (a folder for PYTHONPATH) and what it is a copy of."""

    path: str
    sha256: str
    commit: str
    dirty: tuple[str, ...]
    source: str


def take_snapshot(out: Path) -> Snapshot:
    """Copy the package `jmt_dist` to `<out>/snapshot/<hash>/` and describe it in `<out>/snapshot.json`.

    The folder is named by its content: jobs that still run from an earlier copy keep it, equal code is copied once.
    Raises UserError where jmt_dist is not a plain folder of files.
    """
    source, files = _source()  # read once: hash and copy agree
    digest = _digest(files)
    target = _target(out, digest)
    if _digest(_read(target / "jmt_dist")) != digest:  # not there yet, or changed since
        shutil.rmtree(target, ignore_errors=True)
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        for name, content in files.items():
            copy = part / "jmt_dist" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
        part.replace(target)
    commit, dirty = git_state(source)
    snapshot = Snapshot(str(target), digest, commit, dirty, str(source))
    write_json(out / "snapshot.json", {**asdict(snapshot), "time": now()})
    return snapshot


def snapshot_folder(out: Path) -> Path:
    """Where `take_snapshot` would put the code as it is now; writes nothing."""
    return _target(out, _digest(_source()[1]))


def describe_code(out: Path) -> None:
    """Write `<out>/snapshot.json` for a fold that runs this very code, of which no copy is made."""
    source = Path(jmt_dist.__file__ or "").resolve().parent
    commit, dirty = git_state(source)
    write_json(out / "snapshot.json", {**asdict(Snapshot("", _digest(_read(source)), commit, dirty, str(source))), "time": now()})


def git_state(source: Path) -> tuple[str, tuple[str, ...]]:
    """The commit of the checkout that holds `source` and the changed files of the package; empty outside a checkout."""

    def git(*words: str) -> str:
        answer = subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True, timeout=30, check=True)
        return answer.stdout.rstrip("\n")

    try:
        if not git("ls-files", "config.py"):  # a package installed into some other repository's folder is not its code
            return "", ()
        changed = git("status", "--porcelain", "--untracked-files=normal", "--", ".")
        return git("rev-parse", "HEAD"), tuple(line[3:] for line in changed.splitlines())
    except (OSError, subprocess.SubprocessError):
        return "", ()


def _source() -> tuple[Path, dict[str, bytes]]:
    source = Path(jmt_dist.__file__ or "").resolve().parent
    if not (source / "config.py").is_file():
        raise UserError(f"jmt_dist at {source} is not a folder of Python files", "Install it with pip from a checkout or a wheel.")
    return source, _read(source)


def _target(out: Path, digest: str) -> Path:
    return out / "snapshot" / digest[:12]


def _read(package: Path) -> dict[str, bytes]:
    paths = sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(package)): path.read_bytes() for path in paths}


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
