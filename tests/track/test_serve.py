"""`launch/serve_tracking.py`: what it refuses, and a server for a cluster's network with names and passwords."""

import base64
import http.server
import json
import stat
import threading
import urllib.error
import urllib.request

import pytest

from jmt_dist.errors import UserError
from jmt_dist.track.server import ServeOptions, command_of, serve, with_driver
from jmt_dist.track.tracker import Tracker, connect, create_child, create_experiment
from tests.track.server import Server


@pytest.fixture
def server(request):
    found = Server(*request.param)
    yield found.start()
    found.remove()


def ask(server, path, host="", origin="", user="", body=None):
    """Status of a request, as from a machine that calls the server `host`."""
    request = urllib.request.Request(f"{server.uri}{path}", data=json.dumps(body).encode() if body is not None else None)
    request.add_header("Content-Type", "application/json")
    for name, value in (
        ("Host", host),
        ("Origin", origin),
        ("Authorization", user and f"Basic {base64.b64encode(user.encode()).decode()}"),
    ):
        if value:
            request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


SEARCH, USERS = "/api/2.0/mlflow/experiments/search", "/api/2.0/mlflow/users/create"


@pytest.mark.server
@pytest.mark.parametrize("server", [("auth=true", "allowed_hosts=[tracking.internal]", "workers=1")], indirect=True)
def test_the_setup_for_a_clusters_network(server, tmp_path, monkeypatch):
    kept = server.folder / "out" / "admin-password"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and any(str(kept) in line for line in server.said)
    assert server.said[-1] == f"http://tracking.internal:{server.port}"
    admin, name = f"admin:{kept.read_text()}", f"tracking.internal:{server.port}"
    everything = {"max_results": 5}
    assert ask(server, SEARCH, name, body=everything) == 401
    assert ask(server, SEARCH, name, user="admin:wrong", body=everything) == 401
    assert ask(server, SEARCH, name, user=admin, body=everything) == 200
    assert ask(server, SEARCH, user=admin, body=everything) == 200  # by ssh -L
    assert ask(server, SEARCH, "evil.example", user=admin, body=everything) == 403
    assert ask(server, SEARCH, name, f"http://{name}", admin, everything) == 200  # the server's own pages search by POST
    assert ask(server, SEARCH, name, "http://evil.example", admin, everything) == 403

    assert ask(server, USERS, name, user=admin, body={"username": "ada", "password": "a-long-password"}) == 200
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(UserError, match="cannot be used"):
        create_experiment(server.uri, "team", {}, {})
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
    run_id = create_child(create_experiment(server.uri, "team", {}, {"seed": 0}), "official")
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / "metrics.json").write_text("{}")
    with Tracker(tmp_path / "official" / "spool", server.uri, run_id) as tracker:
        tracker.spool.metrics({"val/ccc_mean": 0.5}, 0)
        tracker.spool.artifact(tmp_path / "official" / "metrics.json")
    run = connect(server.uri).get_run(run_id)
    assert run.data.metrics == {"val/ccc_mean": 0.5} and run.info.status == "FINISHED"
    assert (server.folder / "out" / "artifacts").is_dir() and connect(server.uri).list_artifacts(run_id)[0].path == "metrics.json"
    assert server.stop() == 0


def test_what_cannot_be_served_is_one_line(tmp_path):
    def refused(**options):
        with pytest.raises(UserError) as caught:
            serve(ServeOptions(out=str(tmp_path / "out"), **options))
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "host=0.0.0.0 would let everyone" in refused(host="0.0.0.0")
    assert "neither sqlite nor postgresql nor a URI" in refused(store="mysql")
    other = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    assert f"something already listens at http://127.0.0.1:{other.server_port}" in refused(port=other.server_port)
    other.shutdown()
    other.server_close()


def test_the_command_names_loopback_and_our_driver(tmp_path):
    command, environment = command_of(ServeOptions(), "sqlite:////x.db", tmp_path)
    assert command[command.index("--host") + 1] == "127.0.0.1" and "--allowed-hosts" not in command and "--app-name" not in command
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false" and not list(tmp_path.iterdir())
    command, _ = command_of(ServeOptions(allowed_hosts=["tracking.internal"]), "sqlite:////x.db", tmp_path)
    assert "tracking.internal:*" in command[command.index("--allowed-hosts") + 1].split(",")
    assert with_driver("postgresql://u@db/m") == with_driver("postgres://u@db/m") == "postgresql+psycopg2://u@db/m"
    assert with_driver("postgresql+psycopg://u@db/m") == "postgresql+psycopg://u@db/m"
