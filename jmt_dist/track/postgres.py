"""A PostgreSQL of our own for the tracking server, from the distribution's package: no network, no system service.

It listens on a Unix socket in a private folder alone, so whoever may enter that folder (its owner) may connect.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from jmt_dist.errors import UserError

NAME = "mlflow"  # of the database and its role
SYSTEM_USER = "postgres"  # whom the distribution's package makes; PostgreSQL refuses to run as root
START_SECONDS = 60.0


class Postgres:
    """A running server on the data in `folder`, made there the first time; `uri` is for SQLAlchemy. A context manager.

    Started by root it runs as the user `postgres`. Raises UserError where the package is missing, the folder cannot be
    used, or another server runs on it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder.resolve(), folder.resolve().with_suffix(".log")
        self._user: dict[str, Any] = {"user": SYSTEM_USER, "group": SYSTEM_USER, "extra_groups": []} if os.geteuid() == 0 else {}
        self._sockets = Path()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """`postgresql://` alone would mean the driver psycopg 3."""
        return f"postgresql+psycopg2://{NAME}@/{NAME}?host={self._sockets}"

    def __enter__(self) -> Postgres:
        programs = _programs(self.folder)
        if not (self.folder / "PG_VERSION").is_file():
            self._make(programs)
        # not in the folder: the path of a socket may have 107 characters, no more
        self._sockets = Path(tempfile.mkdtemp(prefix="jmt-postgres-"))
        self._own(self._sockets)
        command = [str(programs / "postgres"), "-D", str(self.folder), "-k", str(self._sockets), "-c", "listen_addresses="]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, **self._user
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End it: what is committed is on the disk, connections are cut."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)  # a fast shutdown, in PostgreSQL's words
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGQUIT)
                self._process.wait()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _make(self, programs: Path) -> None:
        part = self.folder.with_name(f".{self.folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a start that was killed
        part.mkdir(parents=True)
        self._own(part)
        words = ["--username", NAME, "--encoding=UTF8", "--locale=C.UTF-8", "--auth=trust"]  # the socket's folder is the lock
        done = subprocess.run([str(programs / "initdb"), "-D", str(part), *words], capture_output=True, text=True, cwd="/", **self._user)
        if done.returncode:
            said = " ".join(done.stderr.split()[-40:])
            remedy = f"Choose a folder that the user {SYSTEM_USER} can enter, or run this without root." if self._user else "See its words."
            raise UserError(f"no PostgreSQL could be made in {self.folder}: {said}", remedy)
        part.rename(self.folder)

    def _own(self, folder: Path) -> None:
        folder.chmod(0o700)
        if self._user:
            try:
                user = pwd.getpwnam(SYSTEM_USER)
            except KeyError:
                raise UserError(f"there is no user {SYSTEM_USER}", "Install the package postgresql, or run this without root.") from None
            os.chown(folder, user.pw_uid, user.pw_gid)

    def _wait(self) -> None:
        import psycopg2

        assert self._process is not None
        deadline, problem = time.monotonic() + START_SECONDS, ""
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                with contextlib.closing(psycopg2.connect(dbname="postgres", user=NAME, host=str(self._sockets))) as connection:
                    connection.autocommit = True
                    with connection.cursor() as cursor:
                        cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (NAME,))
                        if cursor.fetchone() is None:
                            cursor.execute(f"CREATE DATABASE {NAME}")
                return
            except psycopg2.OperationalError as error:
                problem = " ".join(str(error).split())
                time.sleep(0.1)
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if "FATAL" in line or "HINT" in line]
        raise UserError(f"PostgreSQL does not start: {' '.join(lines[-2:]) or problem}", f"See {self.log}.")


def _programs(folder: Path) -> Path:
    """The folder of initdb and postgres: of the version that made the data, else the newest there is."""
    made = folder / "PG_VERSION"
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if made.is_file():
        version = made.read_text().strip()
        found = [path for path in found if path.parts[-3] == version]
        if not found:
            raise UserError(f"{folder} was made by PostgreSQL {version}, which is not installed", f"Install postgresql-{version}.")
    if found:
        return found[-1].parent
    path = shutil.which("initdb")
    if path is None or shutil.which("postgres") is None:
        raise UserError("PostgreSQL is not installed", "Install the package postgresql, or give store= the URI of a database.")
    return Path(path).parent
