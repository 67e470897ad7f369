"""Checkpoints that are whole or not there at all (DESIGN section 10).

All ranks write into a hidden folder; after a barrier rank 0 adds a manifest of sizes and SHA-256 (integrity, not trust: only load
checkpoints of your own) and publishes the folder by one rename. DeepSpeed's own `latest` file is not used: it is moved before
all ranks have finished writing (measured).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jmt_dist.errors import UserError
from jmt_dist.train.ranks import any_rank, barrier, first_word, from_first, rank, world
from jmt_dist.train.weights import BEST

ENGINE = "engine"  # DeepSpeed's tag inside a checkpoint folder
KEPT = "kept-best.safetensors"  # what the stage calls best at this point
PART = ".saving"  # a checkpoint that is being written: this and its step
VERSION = 2  # of the folder's layout


def _random_state(device: torch.device) -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _save(value: Any, path: Path) -> None:
    """torch.save, with a full disk as OSError: torch's archive writer reports it as RuntimeError."""
    try:
        torch.save(value, path)
    except RuntimeError as error:
        raise OSError(f"{path.name}: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def _deepspeed_writes(engine: Any) -> Iterator[list[OSError]]:
    """Collects what goes wrong when DeepSpeed writes files, instead of leaving it in the middle of its barriers."""
    writer, failures = engine.checkpoint_engine, []

    def tried(write: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any, **named: Any) -> None:
            try:
                write(*arguments, **named)
            except (OSError, RuntimeError) as error:  # nothing here is collective: a RuntimeError is torch's writer
                failures.append(error if isinstance(error, OSError) else OSError(str(error).splitlines()[0]))

        return attempt

    kept = {name: getattr(writer, name) for name in ("save", "makedirs")}
    for name, write in kept.items():
        setattr(writer, name, tried(write))
    # a script that turns shards into weights, for which it needs a package that DeepSpeed does not install; best.safetensors has them
    engine._copy_recovery_script = lambda folder: None
    try:
        yield failures
    finally:
        for name, write in kept.items():
            setattr(writer, name, write)


def _own(number: int) -> str:
    """The file of a checkpoint that a rank writes itself."""
    return f"rank-{number:05d}.pt"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside the engine: progress of the loop, states of the loader, and the folder it came from.

    `loaders` is this rank's own state, or those of all ranks that wrote it where their number was another.
    """

    progress: dict[str, Any]
    loaders: list[dict[str, Any]]
    folder: Path
    same_world: bool


class Checkpoints:
    """The checkpoints of one stage: `<folder>/step-<n>/`, the newest `keep` of them."""

    def __init__(self, folder: Path, key: str, keep: int, device: torch.device) -> None:
        self.folder, self.key, self.keep, self.device = folder, key, keep, device

    def found(self) -> list[Path]:
        """Published checkpoints, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def save(self, engine: Any, step: int, progress: dict[str, Any], loader: dict[str, Any]) -> bool:
        """Write a checkpoint; collective. False where any rank could not write its part: the old ones stay, training goes on."""
        final = self.folder / f"step-{step:08d}"
        if any_rank(rank() == 0 and final.exists(), self.device):
            return True  # the same step is already published: a stop request right after a regular save
        # a name of its own: on NFS another node takes a name for what it stood for up to a minute ago, here the checkpoint before
        part = self.folder / f"{PART}-{step:08d}"
        steps = (
            lambda: self._clear(part),
            lambda: self._write(engine, part, progress, loader),
            lambda: self._publish(part, final, step, engine.zero_optimization_stage()),
        )
        for attempt in steps:
            try:
                attempt()
                problem = ""
            except OSError as error:
                problem = str(error)
            problem = first_word(problem)  # the ranks go on together or not at all; this is also their barrier
            if problem:
                if rank() == 0:
                    shutil.rmtree(part, ignore_errors=True)
                    before = next(iter(self.found()), None)
                    kept = f"training goes on, {before.name} stays the newest" if before else "training goes on without one"
                    print(f"the checkpoint of step {step} could not be written ({problem}); {kept}", flush=True)
                return False
        return True

    def _clear(self, part: Path) -> None:
        if rank() == 0:
            for left in self.folder.glob(f"{PART}*"):  # of starts that were killed
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir(parents=True)

    def _write(self, engine: Any, part: Path, progress: dict[str, Any], loader: dict[str, Any]) -> None:
        with _deepspeed_writes(engine) as failures:
            engine.save_checkpoint(str(part), tag=ENGINE, save_latest=False)
        if failures:
            raise failures[0]
        buffers = {name: value.detach().cpu() for name, value in engine.module.named_buffers()}
        own = {"random": _random_state(self.device), "buffers": buffers, "loader": loader}
        _save(own, part / _own(rank()))
        if rank() == 0:
            (part / "progress.json").write_text(json.dumps(progress))
            self._keep_best(part / KEPT)

    def _keep_best(self, target: Path) -> None:
        # the best weights so far belong to the checkpoint: a resumed run must not meet those of a later epoch, or damaged ones
        best = self.folder.parent / BEST
        if best.exists():
            try:
                os.link(best, target)
            except OSError:  # a file system without hard links
                shutil.copyfile(best, target)

    def _publish(self, part: Path, final: Path, step: int, zero: int) -> None:
        if rank() != 0:
            return
        lacking = next((number for number in range(world()) if not (part / _own(number)).is_file()), None)
        if lacking is not None:
            raise OSError(f"what rank {lacking} wrote is not there: all nodes must share {self.folder}")
        files = {}
        for path in sorted(part.rglob("*")):
            _sync(path)
            if path.is_file():
                files[str(path.relative_to(part))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        manifest = {"version": VERSION, "key": self.key, "world": world(), "zero": zero, "step": step, "files": files}
        manifest["digest"] = _manifest_digest(manifest)
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _sync(part / "manifest.json")
        _sync(part)
        os.replace(part, final)
        _sync(self.folder)
        for old in self.found()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)  # the new one is there in any case; what is left goes with the next

    def _refusal(self, folder: Path) -> str:
        """Why a checkpoint cannot be used; empty where it can."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except (OSError, ValueError):
            return "it has no readable manifest"
        if not isinstance(manifest, dict) or manifest.pop("digest", None) != _manifest_digest(manifest):
            return "its manifest is damaged"
        if manifest["version"] != VERSION:
            return f"it was written by another version of this program ({manifest['version']}, not {VERSION})"
        if manifest["key"] != self.key:
            return "it belongs to another recipe, fold or dataset"
        if manifest["world"] != world() and manifest["zero"] > 0:  # each rank holds a part of the optimiser's state
            return f"it was written by {manifest['world']} ranks under engine.zero={manifest['zero']} and this job has {world()}"
        for name, file in manifest["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                return f"{name} is missing or cut short"
            if _digest(path) != file["sha256"]:
                return f"{name} is damaged"
        return ""

    def load(self, engine: Any) -> Saved | None:
        """Restore the newest usable checkpoint on all ranks; None where there is none at all.

        Unusable ones are named and the one before is tried. Raises UserError where there are some but none is usable: never a
        silent restart from nothing.
        """
        choice: tuple[str, list[str]] = ("", [])
        if rank() == 0:
            refused: list[str] = []
            chosen = ""
            for folder in self.found():
                reason = self._refusal(folder)
                if not reason:
                    chosen = str(folder)
                    break
                refused.append(f"{folder}: {reason}")
            if chosen:
                self._set_aside(Path(chosen))
            choice = (chosen, refused)
        name, refused = from_first(choice)
        if rank() == 0:
            for line in refused:
                print(f"checkpoint refused: {line}", flush=True)
        if not name:
            if refused:
                raise UserError(
                    f"no checkpoint in {self.folder} can be used ({refused[0]})", "Move the folder away to start this stage again."
                )
            return None
        return self._restore(engine, Path(name))

    def _set_aside(self, chosen: Path) -> None:
        """Rename the refused checkpoints newer than the chosen one: they would pass for saved when training comes to their step."""
        for folder in self.found():
            if folder == chosen:
                return
            aside = folder.with_name(f"refused-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)

    def _restore_best(self, folder: Path) -> None:
        if rank() == 0:
            best, kept = self.folder.parent / BEST, folder / KEPT
            best.unlink(missing_ok=True)
            if kept.exists():
                temporary = best.with_suffix(".tmp")
                shutil.copyfile(kept, temporary)  # a copy: what befalls the one must not befall the other
                _sync(temporary)
                os.replace(temporary, best)
        barrier()

    def _restore(self, engine: Any, folder: Path) -> Saved:
        loaded, _ = engine.load_checkpoint(str(folder), tag=ENGINE)
        if loaded is None:
            raise UserError(f"DeepSpeed could not load {folder}", "Move the folder away to use the checkpoint before it.")
        writers = int(json.loads((folder / "manifest.json").read_text())["world"])
        same = writers == world()
        wanted = [rank()] if same else range(writers)
        parts = [torch.load(folder / _own(number), map_location="cpu", weights_only=True) for number in wanted]
        self._restore_best(folder)
        for name, buffer in engine.module.named_buffers():
            values = torch.stack([part["buffers"][name] for part in parts])
            buffer.copy_(values.mean(0) if buffer.is_floating_point() else values[0])
        if same:
            _restore_random_state(parts[0]["random"], self.device)
        return Saved(json.loads((folder / "progress.json").read_text()), [part["loader"] for part in parts], folder, same)
