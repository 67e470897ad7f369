"""What the benchmarks share: their words, the facts of a run, alternating rounds, memory of a process tree, the result."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil

from jmt_dist.config import Options
from jmt_dist.errors import UsageError
from jmt_dist.program import FAILED, OK
from jmt_dist.program import run as run_program
from jmt_dist.recipe import build, word_layer

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("jmt-dist", "torch", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy", "pillow", "av", "soundfile", "webdataset")
MB = 1e6
Opt = TypeVar("Opt", bound=Options)


@dataclass(frozen=True)
class Result:
    """What a benchmark found: `values` for the JSON, `table` (rows of cells, the first its head) for people."""

    values: dict[str, Any]
    table: Sequence[Sequence[str]]
    failed: bool = False  # a part of it is missing: the program ends with 1


def run(bench: Callable[[Opt, Path], Result], doc: str, model: type[Opt], what: str, packages: Sequence[str] = ()) -> NoReturn:
    """Run `bench(options, folder for data)` as a program of the words key=value, `--json [FILE]` and `--out DIR`; exit.

    stdout has the table; with `--json` the JSON instead (the table goes to stderr), with `--json FILE` the JSON is written to FILE,
    or into a folder FILE as <what>_<hardware>_<date>.json. Whatever libraries print goes to stderr.
    """

    def main(words: list[str]) -> int:
        words, json_to, out = _flags(words, REPOSITORY / "runs" / "bench" / what)
        options = build(model, [word_layer(word) for word in words])
        target = _json_path(json_to, what)
        out.mkdir(parents=True, exist_ok=True)
        head = {"benchmark": what, "command": _command(), **facts(packages), "options": options.model_dump(mode="json")}
        stdout = os.dup(1)
        os.dup2(2, 1)  # by descriptor: children of peers' libraries print, too
        try:
            result = bench(options, out)
            sys.stdout.flush()
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        text = json.dumps({**head, **result.values}, indent=1) + "\n"
        print(layout(result.table), file=sys.stderr if json_to == "" else sys.stdout)
        if json_to == "":
            print(text, end="")
        elif target is not None:
            partial = target.with_name(f".{target.name}.partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(target)
            print(target)
        return FAILED if result.failed else OK

    run_program(main, doc, [("Options (and: --json [FILE], --out DIR)", "", model)])


def _flags(words: Sequence[str], default: Path) -> tuple[list[str], str | None, Path]:
    """(other words, JSON file: None = not asked for, "" = stdout, folder for data)."""
    rest: list[str] = []
    json_to: str | None = None
    out = default
    for word in words:
        name, _, value = word.partition("=")
        if name == "json":
            # `--json rounds=3` has arrived as one word: a file name has no `=`
            json_to = "" if value == "true" or "=" in value else value
            rest += [value] if "=" in value else []
        elif name == "out":
            out = Path(value).resolve()
        else:
            rest.append(word)
    return rest, json_to, out


def _json_path(json_to: str | None, what: str) -> Path | None:
    if not json_to:
        return None
    path = Path(json_to)
    if path.is_dir():
        path /= f"{what}_{hardware()}_{time.strftime('%Y-%m-%d')}.json"
    if not path.resolve().parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} for --json", "Make it first, or name another file.")
    return path


def _command() -> str:
    """This command as typed, without folders of this machine."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def facts(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Date, commit, hardware, its load over 1, 5 and 15 minutes, and versions that a result belongs to."""
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    machine: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
    }
    # others at work before the start: a result of a machine that was not idle says so
    machine["load_average"] = [round(load, 2) for load in os.getloadavg()]
    return {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": _commit(), "machine": machine, "versions": versions}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def hardware() -> str:
    """A short name for file names: the GPU, or cores and the processor's family."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():  # a benchmark that has used it
        return str(sys.modules["torch"].cuda.get_device_name()).lower().removeprefix("nvidia ").replace(" ", "-")
    return f"{cores()}cores-{'-'.join(_cpu().replace('(R)', '').replace('(TM)', '').split()[:2]).lower()}"


def _commit() -> str:
    """The commit, with `+changes` where tracked files differ from it."""
    try:
        name = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=REPOSITORY).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+changes" if changed else name


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0))


def use_cores(count: int) -> None:
    """Keep this process and its children on `count` cores. Raises UsageError where there are fewer."""
    there = sorted(os.sched_getaffinity(0))
    if len(there) < count:
        raise UsageError(f"{count} cores are asked for, {len(there)} are there", f"Give cores={len(there)}.")
    os.sched_setaffinity(0, there[:count])


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each side gives in each round. The order turns by one every round: no side always follows the same other."""
    names = list(sides)
    found: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            found[name].append(sides[name]())
        print(f"round {k + 1} of {rounds}: " + ", ".join(f"{name} {found[name][-1]:.1f}" for name in names), flush=True)
    return found


def cpu_seconds() -> float:
    """Processor time of this process and its living children so far."""
    own = psutil.Process()
    times = []
    for process in (own, *own.children(recursive=True)):
        try:
            times.append(process.cpu_times())
        except psutil.Error:
            continue  # it has just ended
    return sum(found.user + found.system for found in times)


def median(values: Sequence[float]) -> float:
    """Median, rounded to 4 significant digits: the rounds differ by far more."""
    return float(f"{statistics.median(values):.4g}")


def spread(values: Sequence[float]) -> str:
    """`median [least-most]` for a table."""
    return f"{median(values):,.0f} [{min(values):,.0f}-{max(values):,.0f}]"


@dataclass
class Memory:
    """Peaks of a process and its descendants in MB while the `with` block runs.

    own: memory of one process that the kernel cannot take back (anonymous and shared), the largest process's; all: the same, summed;
    resident: the largest process's resident set, mapped files (which the kernel can drop) included.
    """

    pid: int
    interval: float = 0.05
    own: float = 0.0
    all: float = 0.0
    resident: float = 0.0
    watch: Callable[[], None] | None = None  # called every second or so
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Memory:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        pids, ticks = [self.pid], 0
        while not self._stop.wait(self.interval):
            if ticks % 20 == 0:  # walking the tree is what costs
                pids = _tree(self.pid)
                if self.watch is not None:
                    self.watch()
            ticks += 1
            found = [status for status in map(_status, pids) if status]
            if found:
                owns = [s.get("RssAnon", 0) + s.get("RssShmem", 0) for s in found]
                self.own, self.all = max(self.own, *owns), max(self.all, sum(owns))
                self.resident = max(self.resident, *(s.get("VmRSS", 0) for s in found))


def _tree(pid: int) -> list[int]:
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.Error:
        return [pid]


def _status(pid: int) -> dict[str, float]:
    """MB by name of /proc/<pid>/status; empty where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name: float(rest.split()[0]) * 1024 / MB for name, _, rest in (line.partition(":") for line in lines) if rest.endswith("kB")}


def layout(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns."""
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
