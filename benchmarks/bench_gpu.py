"""Every stage of the stack on one GPU: decoding, training steps, features, fusion, and the hours of the paper's recipe from them.

    python benchmarks/bench_gpu.py --out DIR                      within 8 minutes on one GPU; JSON and a table in DIR
    python benchmarks/bench_gpu.py small=true device=cpu --out DIR    a dry run of the same code without a GPU

Sections run one after the other; one that fails or finds no time left is named in the result, and the program then ends with 1.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_decode
import gpu_stages
import torch
from common import Result, layout, run
from gpu_ceilings import ceilings
from gpu_setting import GpuBench, Setting, prepare

from jmt_dist.errors import UserError

Section = Callable[[Setting, dict[str, Any]], tuple[dict[str, Any], list[list[str]]]]
# name -> the section; each gets what those before it have found
SECTIONS: dict[str, Section] = {
    "ceilings": ceilings,
    "visual_steps": gpu_stages.visual_steps,
    "visual_end_to_end": gpu_stages.visual_end_to_end,
    "decode": gpu_decode.decode,
    "audio": gpu_stages.audio,
    "features": gpu_stages.features,
    "fusion": gpu_stages.fusion,
    "hours": gpu_stages.hours,
}
HEAD = ["section", "what", "figure", "beside"]


def bench(options: GpuBench, out: Path) -> Result:
    """Run the sections within the time; write what is known after each, so that a run that is cut short has a result, too."""
    began = time.monotonic()
    if options.small:
        options = options.smaller()
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        raise UserError(f"there is no section {', '.join(unknown)}", f"Sections are: {', '.join(SECTIONS)}.")
    setting = prepare(options, out)
    values: dict[str, Any] = {"device": setting.name, "failed": {}, "left_out": []}
    table = [HEAD]
    for name in options.sections:
        if time.monotonic() - began > 60 * options.minutes:
            values["left_out"].append(name)
            continue
        print(f"{name}, after {time.monotonic() - began:.0f} s", flush=True)
        start = time.monotonic()
        try:
            values[name], rows = SECTIONS[name](setting, values)
            values[name]["seconds"] = round(time.monotonic() - start, 1)
            table += [[name, *row] for row in rows]
        except Exception as error:  # one section must not cost the others their device time
            traceback.print_exc()
            values["failed"][name] = f"{type(error).__name__}: {error}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        (out / "bench_gpu.partial.json").write_text(json.dumps(values, indent=1))
        (out / "bench_gpu.txt").write_text(layout(table) + "\n")
    (out / "bench_gpu.partial.json").unlink()
    setting.close()
    values["total_seconds"] = round(time.monotonic() - began, 1)
    for name, error in values["failed"].items():
        table.append([name, "FAILED", error[:80], ""])
    for name in values["left_out"]:
        table.append([name, "LEFT OUT", f"{options.minutes} minutes were over", ""])
    return Result(values, table, failed=bool(values["failed"] or values["left_out"]))


def words() -> None:
    """The JSON goes beside the table, into the folder of `--out`, unless `--json` names another place."""
    given = sys.argv[1:]
    if not any(word.startswith("--json") for word in given):
        place = next((k for k, word in enumerate(given) if word.startswith("--out")), None)
        if place is None:
            sys.argv += ["--out", "runs/bench/gpu"]
            place = len(given)
        word = sys.argv[1:][place]
        folder = word.partition("=")[2] or sys.argv[1:][place + 1]
        Path(folder).mkdir(parents=True, exist_ok=True)
        sys.argv += ["--json", folder]


if __name__ == "__main__":
    if not {"-h", "--help", "help"} & set(sys.argv):
        words()
    run(bench, __doc__ or "", GpuBench, "bench_gpu", ("deepspeed", "torchvision"))
