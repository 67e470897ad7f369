"""What a finished stage leaves: done.json, and for a trained stage its best weights (DESIGN section 10)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jmt_dist.train.weights import whole


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The result of a stage that is done with this key, else None."""
    try:
        result: dict[str, Any] = json.loads((folder / "done.json").read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("key") == key else None


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file under its final name by one rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def done(folder: Path, key: str) -> dict[str, Any] | None:
    """The result of a trained stage whose best weights are there as well, whole; else None: it goes on from its last checkpoint."""
    result = finished(folder, key)
    return result if result is not None and whole(folder, result) else None
