"""Checkpoints that are whole or not there at all (DESIGN section 10).

All ranks write into a hidden folder; after a barrier rank 0 adds a manifest of sizes and SHA-256 (integrity, not trust: only load
checkpoints of your own) and publishes the folder by one rename. DeepSpeed's own `latest` file is not used: it is moved before
all ranks have finished writing (measured).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jmt_dist.errors import UserError
from jmt_dist.train.ranks import any_rank, barrier, from_first, rank, world

ENGINE = "engine"  # DeepSpeed's tag inside a checkpoint folder


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
        """Write a checkpoint; collective. False where one process alone ran out of space: the old ones stay, training goes on."""
        final = self.folder / f"step-{step:08d}"
        if any_rank(rank() == 0 and final.exists(), self.device):
            return True  # the same step is already published: a stop request right after a regular save
        part = self.folder / ".saving"
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        barrier()
        try:
            self._write(engine, part, progress, loader)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            if world() > 1:
                raise  # the other ranks already wait in a collective: the job restarts from the checkpoint before
            shutil.rmtree(part, ignore_errors=True)
            print(f"checkpoint at step {step} could not be written ({error}); training goes on with the one before", flush=True)
            return False
        barrier()
        if rank() == 0:
            self._publish(part, final, step, engine.zero_optimization_stage())
        barrier()
        return True

    def _write(self, engine: Any, part: Path, progress: dict[str, Any], loader: dict[str, Any]) -> None:
        engine.save_checkpoint(str(part), tag=ENGINE, save_latest=False)
        buffers = {name: value.detach().cpu() for name, value in engine.module.named_buffers()}
        own = {"random": _random_state(self.device), "buffers": buffers, "loader": loader}
        torch.save(own, part / f"rank-{rank():05d}.pt")
        if rank() == 0:
            (part / "progress.json").write_text(json.dumps(progress))

    def _publish(self, part: Path, final: Path, step: int, zero: int) -> None:
        files = {}
        for path in sorted(p for p in part.rglob("*") if p.is_file()):
            _sync(path)
            files[str(path.relative_to(part))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        manifest = {"version": 1, "key": self.key, "world": world(), "zero": zero, "step": step, "files": files}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _sync(part / "manifest.json")
        _sync(part)
        os.replace(part, final)
        _sync(self.folder)
        for old in self.found()[self.keep :]:
            shutil.rmtree(old)

    def _refusal(self, folder: Path) -> str:
        """Why a checkpoint cannot be used; empty where it can."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except (OSError, json.JSONDecodeError):
            return "it has no readable manifest"
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

    def _restore(self, engine: Any, folder: Path) -> Saved:
        loaded, _ = engine.load_checkpoint(str(folder), tag=ENGINE)
        if loaded is None:
            raise UserError(f"DeepSpeed could not load {folder}", "Move the folder away to use the checkpoint before it.")
        writers = int(json.loads((folder / "manifest.json").read_text())["world"])
        same = writers == world()
        wanted = [rank()] if same else range(writers)
        parts = [torch.load(folder / f"rank-{number:05d}.pt", map_location="cpu", weights_only=True) for number in wanted]
        for name, buffer in engine.module.named_buffers():
            values = torch.stack([part["buffers"][name] for part in parts])
            buffer.copy_(values.mean(0) if buffer.is_floating_point() else values[0])
        if same:
            _restore_random_state(parts[0]["random"], self.device)
        return Saved(json.loads((folder / "progress.json").read_text()), [part["loader"] for part in parts], folder, same)


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The module's weights on the CPU in fp32, gathered under ZeRO 3; collective, complete on rank 0."""
    module: nn.Module = engine.module
    if engine.zero_optimization_stage() < 3:
        return {name: _plain(value) for name, value in module.state_dict().items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: _plain(value) for name, value in module.state_dict().items()} if rank() == 0 else {}


def _plain(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous().clone()


def save_weights(engine: Any, path: Path) -> None:
    """Write the weights as safetensors under their final name by one rename; collective."""
    from safetensors.torch import save_file

    weights = full_weights(engine)
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file(weights, str(temporary))
        _sync(temporary)
        os.replace(temporary, path)
    barrier()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a model's weights, all keys and shapes equal. Raises UserError where the file is missing or of another model."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"there are no weights at {path}", "Run the stage that writes them first.")
    try:
        model.load_state_dict(load_file(str(path)), strict=True)
    except RuntimeError as error:
        raise UserError(f"{path} holds another model ({str(error).splitlines()[-1].strip()})", "Check the recipe it was made by.") from None
