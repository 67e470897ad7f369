"""SLURM's commands at the one edge where they begin: `sbatch` runs the script it is given, task by task, as slurmd would.

Installed as sbatch, srun, squeue, sacct, scontrol, scancel in a folder on PATH (see `install`). State: one JSON file per job in
$FAKE_SLURM. What is real: the scripts, the environment variables, submitit's parsing of answers, signals, requeue by scontrol.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOME = Path(os.environ.get("FAKE_SLURM", "."))
COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scontrol", "scancel")


def install(folder: Path) -> None:
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        (folder / name).chmod(0o755)


def read(job: str) -> dict[str, Any]:
    return json.loads((HOME / f"{job}.json").read_text())


def write(job: str, **changes: Any) -> None:
    path = HOME / f"{job}.json"
    value = {**(read(job) if path.exists() else {}), **changes}
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(value))
    os.replace(part, path)


def sbatch(words: list[str]) -> int:
    script = Path(words[-1]).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.M))
    if options.get("partition") == "nowhere":
        print("sbatch: error: invalid partition specified: nowhere", file=sys.stderr)
        return 1
    if options.get("partition") == "gpus-only" and "gpus-per-node" not in options:
        print("sbatch: error: this partition takes no job without a GPU", file=sys.stderr)
        return 1
    number = str(100 + len(list(HOME.glob("*.script"))))
    (HOME / f"{number}.script").write_text(script)
    (HOME / f"{number}.options").write_text(json.dumps(options))
    array = options.get("array")
    tasks = range(int(array.split("-")[1].split("%")[0]) + 1) if array else [None]
    names = [number if task is None else f"{number}_{task}" for task in tasks]
    for name in names:
        write(name, state="PENDING", script=str(Path(words[-1]).resolve()))
    if os.environ.get("FAKE_SLURM_HOLD"):
        print(f"Submitted batch job {number}")
        return 0
    if os.fork() == 0:
        os.setsid()
        for stream in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        wanted = options.get("dependency", "").partition(":")[2]
        while wanted and any(read(path.stem)["state"] in ("PENDING", "RUNNING") for path in HOME.glob(f"{wanted}*.json")):
            time.sleep(0.1)
        for name in names:
            run(name, options, number)
        os._exit(0)
    print(f"Submitted batch job {number}")
    return 0


def run(name: str, options: dict[str, str], number: str) -> None:
    environment = {**os.environ, "SLURM_JOB_ID": name.replace("_", "0"), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    environment["SLURM_NTASKS"] = options.get("ntasks-per-node", "1")
    if "_" in name:
        environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": name.split("_")[1]}
    for restart in range(9):
        if restart:
            environment["SLURM_RESTART_COUNT"] = str(restart)
        if read(name)["state"] == "CANCELLED":
            return
        write(name, state="RUNNING", requeue=False)
        with (HOME / f"{name}.batch").open("ab") as log:
            process = subprocess.Popen(["bash", str(HOME / f"{number}.script")], env=environment, stdout=log, stderr=log)
            code = process.wait()
        if not read(name)["requeue"]:
            write(name, state="COMPLETED" if code == 0 else "FAILED", code=code)
            return


def srun(words: list[str]) -> int:
    arguments, output = list(words), ""
    while arguments[0].startswith("-"):
        word = arguments.pop(0)
        if word in ("--output", "--error"):
            output = arguments.pop(0)
    number, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{number}_{task}" if number else os.environ["SLURM_JOB_ID"]
    ranks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        path = output.replace("%A", number or "").replace("%a", task or "").replace("%j", name).replace("%t", str(rank))
        environment = {**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
        with open(path, "ab") as log:
            ranks.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=log))
    write(name, pids=[rank.pid for rank in ranks])
    code = 0
    while None in (codes := [rank.poll() for rank in ranks]):
        bad = [code for code in codes if code not in (None, 0)]
        if bad and "--kill-on-bad-exit=1" in words:
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    for rank in ranks:
        code = code or rank.returncode
    return 128 - code if code < 0 else code


def squeue(words: list[str]) -> int:
    job = words[words.index("--jobs") + 1]
    known = sorted(path.stem for path in HOME.glob(f"{job}*.json"))
    if not known:
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    for name in known:
        if read(name)["state"] in ("PENDING", "RUNNING") and read(name)["state"] in os.environ.get("SQUEUE_STATES", "PENDING,RUNNING"):
            state = read(name)["state"]
            print(f"{name}|{state}|{'None' if state == 'RUNNING' else 'Priority'}|{'n1' if state == 'RUNNING' else ''}")
    return 0


def sacct(words: list[str]) -> int:
    print("JobID|State|NodeList")
    for job in [words[index + 1] for index, word in enumerate(words) if word == "-j"]:
        for path in sorted(HOME.glob(f"{job}*.json")):
            print(f"{path.stem}|{read(path.stem)['state']}|n1")
    return 0


def scontrol(words: list[str]) -> int:
    assert words[0] == "requeue", words
    write(words[1], requeue=True)
    return 0


def scancel(words: list[str]) -> int:
    number = next((int(getattr(signal, f"SIG{word.removeprefix('--signal=')}")) for word in words if word.startswith("--signal=")), 0)
    for job in (word for word in words if not word.startswith("-")):
        for path in sorted(HOME.glob(f"{job}*.json")):
            if not number:
                write(path.stem, state="CANCELLED")
            for pid in read(path.stem).get("pids", []):
                try:
                    os.kill(pid, number or signal.SIGTERM)
                except ProcessLookupError:
                    continue
    return 0


if __name__ == "__main__":
    sys.exit({name: globals()[name] for name in COMMANDS}[sys.argv[1]](sys.argv[2:]))
