"""A fold on two ranks, killed again and again, ends bit for bit where one that is left alone does."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from jmt_dist.config import PackOptions
from jmt_dist.data.pack import pack
from jmt_dist.track import names
from jmt_dist.track.spool import read_metrics
from tests.data.tree import write_unit
from tests.ranks import server

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
KILLS = 20


def fold(rank: int, folder: Path, out: Path) -> None:
    """The whole pipeline with dropout and BatchNorm, a checkpoint after every step."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port(out)))
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    from jmt_dist.recipe import load_recipe, load_site
    from jmt_dist.train.fold import run_fold

    words = [f"data.shards={folder}/shards", "visual.size=16", "evaluate.bootstrap=20", "fusion.baselines=[]", "fusion.seeds=[0]"]
    words += [f"{stage}.{word}" for stage in ("visual", "audio", "fusion") for word in ("batch=4", "save_steps=1", "max_epochs=2")]
    words += ["visual.max_steps=8", "audio.max_steps=8", "fusion.max_steps=8", "fusion.jmt.dropout=0.2", "fusion.offsets_per_epoch=1"]
    words += ["features.offsets=[1]", "features.batch=4", "fusion.validation_offsets=[1]", "evaluate.offsets=[1]"]
    run_fold(load_recipe(RECIPE, words), load_site(None), "official", out)


def port(out: Path) -> int:
    """The port noted by the test: each start has its own, as each job of a scheduler has."""
    return int((out / "port").read_text())


class Job:
    """Two ranks of one start."""

    def __init__(self, folder: Path, out: Path, context: Any) -> None:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            (out / "port").write_text(str(probe.getsockname()[1]))
        self.ranks = [context.Process(target=fold, args=(rank, folder, out)) for rank in range(2)]
        for process in self.ranks:
            process.start()

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.ranks)

    def kill(self, first: int, between: float) -> None:
        """SIGKILL to one rank and then to the other, which may have noticed by then."""
        os.kill(self.ranks[first].pid, signal.SIGKILL)
        time.sleep(between)
        for process in self.ranks:
            process.kill()
            process.join()

    def wait(self) -> list[int | None]:
        for process in self.ranks:
            process.join(300)
        return [process.exitcode for process in self.ranks]


def digests(official: Path) -> dict[str, Any]:
    """Final weights by SHA-256, results of all stages, the fold's metrics, and every point of every curve."""
    weights = {
        str(path.relative_to(official)): hashlib.sha256(path.read_bytes()).hexdigest() for path in official.rglob("best.safetensors")
    }
    results = {str(path.relative_to(official)): json.loads(path.read_text()) for path in official.rglob("done.json")}
    pace = (names.WAIT, names.SPEED)  # the clock's and the machine's, not the training's
    own = {name: points for name, points in read_metrics(official / "spool").items() if not name.startswith("system/")}
    curves = {name: sorted(set(points)) for name, points in own.items() if not name.endswith(pace)}
    return {"weights": weights, "results": results, "metrics": json.loads((official / "metrics.json").read_text()), "curves": curves}


def saving(out: Path, since: float) -> bool:
    """Whether a save that began after `since` is under way; what an earlier kill left behind does not count."""
    try:
        return any(path.stat().st_mtime > since for path in out.glob("official/**/.saving-*"))
    except FileNotFoundError:  # published between the listing and the look
        return False


@pytest.mark.kill
@pytest.mark.timeout(1500)
def test_a_fold_killed_twenty_times_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    for k in range(7):
        write_unit(tmp_path / "tree", f"u{k}", 70, k, "Train_Set" if k < 5 else "Validation_Set")
    pack(PackOptions(source=str(tmp_path / "tree"), out=str(tmp_path / "shards"), workers=1), say=lambda line: None)
    context = server()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        out.mkdir()
    began = time.monotonic()
    assert Job(tmp_path, whole, context).wait() == [0, 0]
    usual = time.monotonic() - began
    rng, log = random.Random(0), []
    while len(log) < KILLS:
        started = time.time()
        job = Job(tmp_path, parts, context)
        aimed_at_a_save = len(log) % 2 == 0
        deadline = time.monotonic() + (60 if aimed_at_a_save else rng.uniform(0.05, 0.5) * usual)
        while job.alive() and time.monotonic() < deadline and not (aimed_at_a_save and saving(parts, started)):
            time.sleep(0.002)
        if aimed_at_a_save:
            time.sleep(rng.uniform(0, 0.1))
        if not job.alive():
            assert job.wait() == [0, 0]  # it has come to its end: begin anew, the kills so far have been compared
            assert digests(parts / "official") == digests(whole / "official")
            (parts / "official").rename(parts / f"ended-{len(log)}")
            continue
        stages = {path.parent.parent.name: path.name for path in sorted(parts.glob("official/**/step-*"))}
        log.append(f"kill {len(log) + 1}: {'during a save' if saving(parts, started) else 'between saves'}, newest checkpoints {stages}")
        job.kill(rng.randrange(2), rng.uniform(0, 0.3))
    assert Job(tmp_path, parts, context).wait() == [0, 0]
    found = digests(parts / "official")
    print("\n".join([*log, *(f"{name} {digest}" for name, digest in found["weights"].items())]))
    assert sum("during a save" in line for line in log) >= 3
    assert found == digests(whole / "official")
