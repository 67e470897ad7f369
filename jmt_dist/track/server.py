"""The MLflow server of a team: one command starts it, on the loopback address unless told otherwise (DESIGN section 12)."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated

from pydantic import Field

from jmt_dist.config import Options
from jmt_dist.errors import UserError
from jmt_dist.track.postgres import Postgres
from jmt_dist.track.tracker import SQLITE

LOOPBACK = ("127.0.0.1", "localhost", "::1")
START_SECONDS = 300.0  # 8 to 14 s on an idle machine
AUTH = """[mlflow]
default_permission = EDIT
database_uri = sqlite:///{database}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


class ServeOptions(Options):
    """Where the runs are kept, and who may reach them."""

    out: str = Field("tracking", description="folder for database, files and log")
    store: str = Field(
        "sqlite", description="sqlite: a file in out; postgresql: a server of our own in out; or the URI of a database that exists"
    )
    host: str = Field("127.0.0.1", description="address to listen on; any other than loopback needs auth=true")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(5000, description="port to listen on")
    allowed_hosts: list[str] = Field([], description="names under which others reach this machine, such as tracking.internal")
    auth: bool = Field(False, description="ask for user and password")
    workers: Annotated[int, Field(ge=1)] = Field(2, description="processes that answer")


def serve(options: ServeOptions) -> int:
    """Run the server until SIGINT or SIGTERM; returns its exit code. Raises UserError for what can be known beforehand."""
    os.umask(0o077)
    _check(options)
    out = Path(options.out).resolve()
    if not out.exists():
        out.mkdir(parents=True)
        out.chmod(0o711 if os.geteuid() == 0 else 0o700)  # root's PostgreSQL is another user's, who has to get in
    with contextlib.ExitStack() as stack:
        if options.store == "postgresql":
            print(f"starting PostgreSQL on {out / 'postgresql'}", flush=True)
            uri = stack.enter_context(Postgres(out / "postgresql")).uri
        else:
            uri = f"{SQLITE}{out / 'mlflow.db'}" if options.store == "sqlite" else with_driver(options.store)
        command, environment = command_of(options, uri, out)
        stopped = stack.enter_context(_asked_to_stop())
        with open(out / "server.log", "ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=out
            )
        try:
            return _watch(process, options, out, stopped)
        finally:
            _end(process)


def command_of(options: ServeOptions, uri: str, out: Path) -> tuple[list[str], dict[str, str]]:
    """The command of `mlflow server` and its environment; writes the files that auth=true needs into `out`."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", options.host, "--port", str(options.port)]
    command += ["--workers", str(options.workers), "--backend-store-uri", uri, "--artifacts-destination", str(out / "artifacts")]
    if options.allowed_hosts:
        # names given here replace MLflow's own list, so that of this machine goes in again
        known = [*options.allowed_hosts, "localhost", "127.0.0.1"]
        command += ["--allowed-hosts", ",".join(form for name in known for form in (name, f"{name}:*"))]
        # a browser names the page it is on with every change and search: without these the server's own pages stay empty
        origins = [f"{scheme}://{name}{port}" for name in options.allowed_hosts for scheme in ("http", "https") for port in ("", ":*")]
        command += ["--cors-allowed-origins", ",".join(origins)]
    # the job runner would take 6 processes and 1.5 GB more, for evaluations of language models
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    if options.auth:
        command += ["--app-name", "basic-auth"]
        (out / "auth.ini").write_text(AUTH.format(database=out / "auth.db"), encoding="utf-8")
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(out / "auth.ini")
        environment.setdefault("MLFLOW_AUTH_ADMIN_PASSWORD", _secret(out / "admin-password"))
        environment.setdefault("MLFLOW_FLASK_SERVER_SECRET_KEY", _secret(out / "secret-key"))
    return command, environment


def _check(options: ServeOptions) -> None:
    if options.host not in LOOPBACK and not options.auth:
        raise UserError(
            f"host={options.host} would let everyone on that network read and change the runs",
            "Add auth=true; or leave host alone and go through ssh -L.",
        )
    if options.auth and find_spec("flask_wtf") is None:
        raise UserError("auth=true needs the package Flask-WTF", "pip install -c constraints-cuda13.txt -e '.[server]'")
    if (options.store == "postgresql" or options.store.startswith("postgresql")) and find_spec("psycopg2") is None:
        raise UserError("PostgreSQL needs the package psycopg2-binary", "pip install -c constraints-cuda13.txt -e '.[server]'")
    if options.store not in ("sqlite", "postgresql") and "://" not in options.store:
        raise UserError(
            f"store={options.store} is neither sqlite nor postgresql nor a URI", "Such as store=postgresql://user@db:5432/mlflow"
        )
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1" if options.host == "0.0.0.0" else options.host, options.port), 2),
    ):
        raise UserError(f"something already listens at {_address(options)}", "End it, or choose another port=.")


def with_driver(uri: str) -> str:
    """`postgresql://` means psycopg 3 to SQLAlchemy 2.1; the driver we install is psycopg2."""
    for prefix in ("postgresql://", "postgres://"):
        if uri.startswith(prefix):
            return f"postgresql+psycopg2://{uri.removeprefix(prefix)}"
    return uri


def _secret(path: Path) -> str:
    """What the file holds; made at random the first time, readable by its owner alone."""
    if not path.is_file():
        part = path.with_name(f".{path.name}")
        part.touch(mode=0o600)
        part.write_text(secrets.token_urlsafe(24), encoding="utf-8")
        os.replace(part, path)
    return path.read_text(encoding="utf-8").strip()


def _address(options: ServeOptions) -> str:
    host = "127.0.0.1" if options.host == "0.0.0.0" else f"[{options.host}]" if ":" in options.host else options.host
    return f"http://{host}:{options.port}"


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(process: subprocess.Popen[bytes], options: ServeOptions, out: Path, stopped: list[int]) -> int:
    """Wait for the first answer, say where it is, then for the end."""
    deadline, ready = time.monotonic() + START_SECONDS, False
    while process.poll() is None and not stopped:
        if not ready and _answers(options):
            ready = True
            _announce(options, out)
        if not ready and time.monotonic() > deadline:
            raise UserError(f"the server does not answer after {START_SECONDS:.0f} s", f"See {out / 'server.log'}.")
        time.sleep(0.2)
    if not stopped:
        raise UserError(f"the server has ended with exit code {process.returncode}", f"See {out / 'server.log'}.")
    return 0


def _answers(options: ServeOptions) -> bool:
    try:
        with urllib.request.urlopen(f"{_address(options)}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _announce(options: ServeOptions, out: Path) -> None:
    names = [f"http://{name}:{options.port}" for name in options.allowed_hosts] or [_address(options)]
    if options.auth:
        print(f"user admin, password in {out / 'admin-password'}; others sign up at {names[0]}/signup as admin")
    print(f"jobs find it by site.tracking_uri={names[0]}; ends with Ctrl-C; log {out / 'server.log'}")
    print(names[0], flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The server has workers of its own: the whole group, politely first."""
    for number, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
            if number == signal.SIGTERM:
                continue  # its workers may outlive it: SIGKILL clears what is left
    process.wait()
