"""Tracking against a real MLflow server that dies and comes back, and the report in a real browser (slow tier)."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from jmt_dist.track.replay import unsent
from jmt_dist.track.report import compare_run
from jmt_dist.track.sync import sync
from jmt_dist.track.tracker import Tracker, connect, create_child, create_experiment, save_run
from tests.track.runfolder import make_fixture_json, make_run


class Server:
    """`mlflow server` on a SQLite file, in a process group of its own, so that all its workers can be killed at once."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.uri, self.process = folder, f"http://127.0.0.1:{self.port}", None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", str(self.folder / "artifacts")]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.3)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    found = Server(tmp_path)
    found.start()
    yield found
    if found.process.poll() is None:
        found.kill()


@pytest.mark.server
@pytest.mark.kill
def test_a_server_killed_in_the_middle_costs_no_point(server, tmp_path, monkeypatch):
    monkeypatch.setattr("jmt_dist.track.tracker.INTERVAL_SECONDS", 0.5)
    parent = create_experiment(server.uri, "server", {}, {"seed": 0})
    run_id = create_child(parent, "official")
    out = tmp_path / "run"
    folder = out / "official" / "spool"
    save_run(folder, server.uri, run_id)
    parent.save(out)
    slowest = 0.0
    with Tracker(folder, server.uri, run_id) as tracker:
        for step in range(4_000):
            before = time.perf_counter()
            tracker.spool.metrics({"loss": step / 3, "score": step / 7}, step)
            slowest = max(slowest, time.perf_counter() - before)
            if step == 1_500:
                deadline = time.monotonic() + 60
                while unsent(folder, run_id) == 1_502 and time.monotonic() < deadline:
                    time.sleep(0.05)
                server.kill()
            time.sleep(0.001)
        started = time.monotonic()
    assert time.monotonic() - started < 12 and slowest < 1.0
    left = unsent(folder, run_id)
    assert 0 < left < 4_002  # a part had arrived before the kill
    server.start()
    reports = sync(out)
    assert not reports[0].problem and reports[0].report.left == 0
    (folder / "offset.json").unlink()
    sync(out)  # once more from the beginning
    client = connect(server.uri)
    for name, divisor in (("loss", 3), ("score", 7)):
        points = sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))
        assert points == [(step, step / divisor) for step in range(4_000)]
    assert client.get_run(run_id).info.status == "FINISHED"


PROBE = """<script>
addEventListener("load", () => {
  const loaded = performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:"));
  const images = [...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width]);
  const tables = [...document.querySelectorAll("table")].map(table => table.rows.length);
  document.title = JSON.stringify({loaded, images, tables, wide: document.documentElement.scrollWidth > innerWidth});
});
</script>"""


@pytest.mark.browser
def test_report_in_a_browser(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "the slow tier installs chromium"
    make_run(tmp_path / "demo", folds=("official", "fold-1"))
    compare_run(tmp_path / "demo", make_fixture_json(tmp_path / "fixture.json"))
    page = tmp_path / "probed.html"
    page.write_text((tmp_path / "demo" / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--window-size=1200,900"]
    command += ["--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr[-2000:]
    seen = json.loads(title[1])
    assert seen["loaded"] == [] and seen["tables"] == [8, 7] and not seen["wide"]
    assert len(seen["images"]) == 4 and all(natural > 300 and shown > 300 for natural, shown in seen["images"])
