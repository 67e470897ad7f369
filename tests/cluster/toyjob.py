"""A fold job without training: same shape as jmt_dist.train.fold.run_fold, behaviour from the variable TOY (JSON by fold)."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from jmt_dist.cluster.attempts import read_attempts
from jmt_dist.cluster.status import update_status
from jmt_dist.errors import UserError
from jmt_dist.train import stop


def run_fold(recipe: Any, site: Any, fold: str, out: Path) -> None:
    toy = json.loads(os.environ.get("TOY", "{}"))
    toy = {"steps": 3, "seconds": 0.02, **toy.get("*", {}), **toy.get(fold, {})}
    rank, folder = int(os.environ["RANK"]), out / fold
    if toy.get("stages"):
        do_stages(recipe, fold, out, toy.get("fail_stage", ""))
    state = folder / f"state-{rank}"
    step = int(state.read_text()) if state.exists() else 0
    import jmt_dist

    note = {"pid": os.getpid(), "fold": fold, "rank": rank, "world": int(os.environ["WORLD_SIZE"]), "from": step, "time": time.time()}
    names = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_RESTART_COUNT")
    note |= {name: os.environ.get(name) for name in names} | {"code": jmt_dist.__file__, "extra": os.environ.get("TOY_EXTRA")}
    with (out / "starts.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")
    tries = len(read_attempts(out, fold)) if rank == 0 else int(toy.get("try", 1))
    while step < toy["steps"]:
        if stop.requested():
            if toy.get("deaf"):
                stop.clear()
            else:
                raise stop.Stopped(stop.requested())
        time.sleep(toy["seconds"])
        step += 1
        state.write_text(str(0 if toy.get("forget") else step))
        if rank == 0:
            update_status(out, fold, stage="visual", epoch=0, step=step, steps=toy["steps"], score=0.1 * step)
        if step == toy.get("die_at") and rank == toy.get("die_rank", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == toy.get("raise_at") and rank == toy.get("raise_rank", 0):
            raise UserError(toy["user"]) if toy.get("user") else RuntimeError(f"toy failure at start {tries}")
        if toy.get("warn_at") == step and rank == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
    ranks = [folder / f"state-{other}" for other in range(note["world"]) if other != rank]
    while not all(path.exists() and int(path.read_text() or 0) >= toy["steps"] for path in ranks):
        if stop.requested() and not toy.get("deaf"):
            raise stop.Stopped(stop.requested())
        time.sleep(0.05)  # like a collective: nobody leaves before the others
    if rank == 0:
        (folder / "metrics.json").write_text(json.dumps({"fold": fold, "valence": 0.5, "arousal": 0.6, "average": 0.55}))
    with (out / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "fold": fold, "rank": rank, "end": time.time()}) + "\n")


def do_stages(recipe: Any, fold: str, out: Path, fail: str) -> None:
    """Stage folders as training leaves them; those that are there already are not done again."""
    did = [stage for stage in recipe.stages if not (out / fold / stage / "done.json").exists()]
    for stage in did:
        if stage == fail:
            raise UserError(f"toy failure in {stage}")
        (out / fold / stage).mkdir(exist_ok=True)
        (out / fold / stage / "done.json").write_text("{}")
    with (out / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"fold": fold, "did": did}) + "\n")


def gloo(recipe: Any, site: Any, fold: str, out: Path) -> None:
    """Every rank adds its number over a real process group made from the environment alone."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    (out / f"sum-{dist.get_rank()}").write_text(f"{total.item():g} {torch.get_num_threads()}")
    (out / f"node-{dist.get_rank()}").write_text(os.environ.get("SLURMD_NODENAME", ""))
    (out / f"password-{dist.get_rank()}").write_text(f"{len(os.environ.get('MLFLOW_TRACKING_PASSWORD', ''))} characters")
    dist.destroy_process_group()


def compare(out: Path) -> None:
    folds = sorted(path.parent.name for path in out.glob("*/metrics.json"))
    (out / "table1.csv").write_text("\n".join(["fold", *folds]) + "\n")
    print(f"compared {len(folds)} folds in {out}", file=sys.stderr)


def compare_sweep(out: Path) -> None:
    (out / "comparison.csv").write_text("\n".join(json.loads((out / "sweep.json").read_text())["variants"]) + "\n")
