"""The tracking server's own PostgreSQL, from the distribution's package."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

import psycopg2
import pytest

from jmt_dist.errors import UserError
from jmt_dist.track import postgres
from jmt_dist.track.postgres import NAME, Postgres


@pytest.fixture
def folder():
    """Where the user `postgres`, too, can get: pytest's folders are for their owner alone."""
    found = Path(tempfile.mkdtemp(prefix="jmt-postgres-test-"))
    found.chmod(0o711)
    yield found / "data"
    shutil.rmtree(found)


def connection(server):
    return psycopg2.connect(dbname=NAME, user=NAME, host=str(server._sockets))


@pytest.mark.server
def test_what_is_stored_stays_and_nobody_else_gets_in(folder):
    with Postgres(folder) as server:
        with connection(server) as open_one, open_one.cursor() as cursor:
            cursor.execute("CREATE TABLE kept (x int)")
            cursor.execute("INSERT INTO kept VALUES (7)")
            cursor.execute("SHOW listen_addresses")
            assert cursor.fetchone() == ("",)
        open_one.close()
        assert stat.S_IMODE(server._sockets.stat().st_mode) == 0o700 and stat.S_IMODE(folder.stat().st_mode) == 0o700
        with pytest.raises(UserError, match=r"PostgreSQL does not start: .*lock file.*postmaster\.pid"), Postgres(folder):
            pass
        still = connection(server)  # the refused one did no harm
        process, sockets = server._process, server._sockets
        still.close()
    assert process.returncode == 0 and not sockets.exists()
    (folder.with_name(f".{folder.name}.part")).mkdir()  # what a start that was killed leaves
    with Postgres(folder) as server:
        with connection(server) as again, again.cursor() as cursor:
            cursor.execute("SELECT x FROM kept")
            assert cursor.fetchall() == [(7,)]
        again.close()


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    (tmp_path / "PG_VERSION").write_text("7\n")
    with pytest.raises(UserError, match=r"made by PostgreSQL 7, which is not installed. Install postgresql-7"):
        Postgres(tmp_path).__enter__()
    monkeypatch.setattr(postgres.Path, "glob", lambda *_: iter(()))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="PostgreSQL is not installed"):
        Postgres(tmp_path / "new").__enter__()
    assert os.listdir(tmp_path) == ["PG_VERSION"]
