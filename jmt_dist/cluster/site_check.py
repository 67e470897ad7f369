"""Whether a site can run jobs: every check says what it found, or what to do."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from jmt_dist.cluster import network_check, preflight
from jmt_dist.cluster import site as sites
from jmt_dist.cluster.finding import Finding
from jmt_dist.cluster.options import CheckOptions
from jmt_dist.config import Recipe, Site
from jmt_dist.errors import UserError
from jmt_dist.program import FAILED, OK

SLURM_COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scontrol", "scancel")
LOCAL_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs")
IMPORT_SECONDS = 180


def check_site(options: CheckOptions, site: Site, recipe: Recipe | None) -> int:
    """Run every check and print it as it ends; 1 where one failed."""
    print(f"checking {site.name} ({site.executor}) from {socket.gethostname()}", flush=True)
    failed = 0
    for check in checks(options, site, recipe):
        for finding in _guarded(check):
            print(finding.line(), flush=True)
            failed += finding.outcome == "fail"
    print(f"{failed} check(s) failed" if failed else "everything a job needs is there")
    return FAILED if failed else OK


def checks(options: CheckOptions, site: Site, recipe: Recipe | None) -> list[Callable[[], Iterator[Finding]]]:
    """The checks of a site, the cheapest first."""
    out = Path(options.out).expanduser().resolve()
    chosen = [
        lambda: _fields(site),
        _python,
        _host,
        lambda: _folder(out, site),
        lambda: _tracking(out, site),
        lambda: _weights(recipe, site),
    ]
    if recipe is not None:
        chosen.append(lambda: _shards(recipe, site))
    if site.executor == "slurm":
        chosen += [
            _slurm_commands,
            lambda: _slurm_submission(site),
            lambda: network_check.names(site),
            lambda: network_check.interfaces(site),
        ]
        chosen.append(lambda: network_check.meeting(site, out))
    return [*chosen, lambda: _machine(site), _libraries, lambda: _gpu(site)]


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except UserError as error:
        yield Finding("recipe and site", "fail", error.sentence, error.remedy)
    except Exception as error:  # a check that breaks is a finding, and the others go on
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        yield Finding(check.__name__.strip("_<>"), "fail", words, "This check could not be made here; the others count.")


def _fields(site: Site) -> Iterator[Finding]:
    sites.check(site)
    yield Finding("site file", "ok", f"{sites.ranks(site)} rank(s) per fold, {site.parallel} fold(s) at a time, time limit {site.time}")


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    remedy = "" if good else "Make the environment with Python 3.11 or 3.12."
    yield Finding("python", "ok" if good else "fail", f"{version}, {sys.executable}", remedy)


def _host() -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        yield Finding("host name", "ok", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        remedy = "Jobs of one node do not need it; for several nodes add it to DNS or /etc/hosts."
        yield Finding("host name", "note", f"{name} does not resolve", remedy)


def _folder(out: Path, site: Site) -> Iterator[Finding]:
    """Writable, lockable, roomy, and under SLURM not on a disk of this machine alone."""
    import fcntl

    existing = next(path for path in (out, *out.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        yield Finding("run folder", "fail", f"{existing} cannot be written or locked ({error.strerror})", "Choose another out=.")
        return
    free = shutil.disk_usage(existing).free / 2**30
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(existing)], capture_output=True, text=True).stdout.strip()
    kind = {"ext2/ext3": "ext4"}.get(kind, kind)
    yield Finding(
        "run folder", "ok" if free > 20 else "note", f"{existing}, {free:.0f} GB free, {kind}", "" if free > 20 else "Few GB are left."
    )
    if site.executor == "slurm" and any(kind.startswith(name) for name in LOCAL_FILE_SYSTEMS):
        yield Finding(
            "run folder", "note", f"{kind} is usually a disk of one machine", "The nodes must see the same folder under the same path."
        )


def _tracking(out: Path, site: Site) -> Iterator[Finding]:
    uri = site.tracking_uri
    if not uri:
        how = "one SQLite file beside the run folders" if site.executor == "local" else "jobs spool; the comparison job fills a SQLite file"
        yield Finding("tracking", "ok", f"{how} ({out / 'mlflow.db'})")
    elif uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
                yield Finding("tracking", "ok", f"{uri} answers {answer.status}")
        except (urllib.error.URLError, OSError, ValueError) as error:
            remedy = "Start it, open the way to it, or add this host to its --allowed-hosts. Jobs run without it and spool."
            yield Finding("tracking", "fail", f"{uri} does not answer ({error})", remedy)
    else:
        sqlite_shared = uri.startswith("sqlite") and site.executor == "slurm"
        remedy = "SQLite on a shared file system is unsafe: leave site.tracking_uri empty, or run mlflow server." if sqlite_shared else ""
        yield Finding("tracking", "fail" if sqlite_shared else "ok", uri, remedy)


def _weights(recipe: Recipe | None, site: Site) -> Iterator[Finding]:
    cache = preflight.weights_cache()
    for name, pattern in preflight.CACHED.items():
        found = sorted(cache.glob(pattern))
        needed = recipe is not None and name in (recipe.visual.weights, recipe.audio.weights)
        remedy = "" if found else "Run launch/fetch_weights.py on a machine with a network."
        yield Finding(
            f"weights {name}", "ok" if found else "fail" if needed else "note", str(found[0]) if found else f"not in {cache}", remedy
        )


def _shards(recipe: Recipe, site: Site) -> Iterator[Finding]:
    folds, _ = preflight.check(preflight.absolute(recipe), site, [])
    yield Finding("shards", "ok", f"{recipe.data.shards}: {', '.join(folds)}")


def _slurm_commands() -> Iterator[Finding]:
    missing = [name for name in SLURM_COMMANDS if shutil.which(name) is None]
    if missing:
        yield Finding("SLURM commands", "fail", f"{', '.join(missing)} not found", "Use a login node, or load SLURM's module.")
        return
    version = subprocess.run(["srun", "--version"], capture_output=True, text=True, timeout=30).stdout.strip()
    yield Finding("SLURM commands", "ok", version or "found")
    ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=60)
    up = ping.returncode == 0 and "UP" in ping.stdout
    yield Finding(
        "SLURM controller", "ok" if up else "fail", " ".join((ping.stdout + ping.stderr).split()), "" if up else "Ask the cluster's staff."
    )
    sacct = subprocess.run(["sacct", "-n", "-X", "--starttime", "now"], capture_output=True, text=True, timeout=60)
    words = " ".join(sacct.stderr.split()) or "sacct answers"
    remedy = "" if sacct.returncode == 0 else "submitit asks sacct for finished jobs: accounting storage must be on."
    yield Finding("SLURM accounting", "ok" if sacct.returncode == 0 else "fail", words, remedy)


def _slurm_submission(site: Site) -> Iterator[Finding]:
    """SLURM's own opinion of the job: `sbatch --test-only` on a script with the site's options."""
    from submitit.slurm.slurm import _make_sbatch_string

    from jmt_dist.cluster.slurm import sbatch_defaults

    if shutil.which("sbatch") is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        parameters = sites.slurm_parameters(site, name="check", snapshot=Path(folder), out=Path(folder), teardown=[])
        script = Path(folder) / "check.sh"
        script.write_text(_make_sbatch_string(command="true", folder=folder, **parameters))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")} | sbatch_defaults(site)
        answer = subprocess.run(["sbatch", "--test-only", str(script)], capture_output=True, text=True, timeout=60, env=environment)
    words = " ".join((answer.stderr or answer.stdout).split())
    remedy = "" if answer.returncode == 0 else "Change what it names in the site file (partition, account, qos, time, GPUs)."
    yield Finding("SLURM takes the job", "ok" if answer.returncode == 0 else "fail", words, remedy)


def _machine(site: Site) -> Iterator[Finding]:
    if site.executor != "local":
        return
    cores, wanted = len(os.sched_getaffinity(0)), site.parallel * sites.ranks(site) * site.cpus_per_rank
    remedy = "" if wanted <= cores else "Fewer parallel folds, ranks or cpus_per_rank would be no slower."
    yield Finding("cores", "ok" if wanted <= cores else "note", f"{wanted} wanted at a time, {cores} here", remedy)


def _import(code: str) -> tuple[bool, str]:
    """Run Python in a process of its own: a library that crashes takes no check along."""
    environment = {**os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    try:
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {IMPORT_SECONDS} s"
    lines = (answer.stdout if answer.returncode == 0 else answer.stderr).strip().splitlines()
    return answer.returncode == 0, lines[-1][:300] if lines else f"exit code {answer.returncode}"


_PROBES = {
    "torch": "import torch; print(torch.__version__, 'CUDA', torch.version.cuda)",
    "DALI": "import nvidia.dali as d, nvidia.dali.fn as fn\n"
    "@d.pipeline_def(batch_size=1, num_threads=1, device_id=None)\n"
    "def p(): return fn.constant(idata=[1])\n"
    "q = p(); q.build(); q.run(); print(d.__version__)",
    "deepspeed": "import setuptools, logging; logging.disable(50); import deepspeed; print(deepspeed.__version__)",
    "mlflow": "import mlflow; print(mlflow.__version__)",
}


def _libraries() -> Iterator[Finding]:
    for name, code in _PROBES.items():
        good, found = _import(code)
        yield Finding(name, "ok" if good else "fail", found, "" if good else "Install with the constraints file: make sets up all of it.")


def _gpu(site: Site) -> Iterator[Finding]:
    """The driver against the wheels: a driver that is older than the CUDA of the wheels leaves torch without a GPU."""
    wanted = site.device == "cuda" or site.gpus_per_node > 0
    if site.device == "cpu":
        return
    gpus = sites.visible_gpus()
    if not gpus:
        if wanted and site.executor == "slurm":
            words = f"srun --gpus-per-node={max(1, site.gpus_per_node)} python launch/check_site.py site=…"
            yield Finding("GPU", "note", "none on this machine", f"Check on a node: {words}")
        elif wanted:
            yield Finding("GPU", "fail", "none on this machine", "Set site.device=cpu and site.gpus_per_node=0, or mend the driver.")
        else:
            yield Finding("GPU", "ok", "none here; jobs run on the CPU (site.device=auto)")
        return
    import pynvml

    pynvml.nvmlInit()
    number = int(pynvml.nvmlSystemGetCudaDriverVersion())
    driver = f"driver {pynvml.nvmlSystemGetDriverVersion()} for CUDA up to {number // 1000}.{number % 1000 // 10}"
    probe = "import torch; assert torch.cuda.is_available(); x = torch.ones(2, device='cuda').sum().item(); "
    good, found = _import(probe + "print(torch.cuda.device_count(), torch.cuda.get_device_name(0), 'NCCL', torch.cuda.nccl.version())")
    remedy = "" if good else "Wheels for CUDA 13 need driver 580 or newer; for older ones install with CUDA=12."
    yield Finding("GPU", "ok" if good else "fail", f"{driver}; torch: {found}", remedy)
