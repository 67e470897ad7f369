"""The report in a real browser (slow tier)."""

import json
import re
import shutil
import subprocess

import pytest

from jmt_dist.track.report import compare_run
from tests.track.runfolder import make_fixture_json, make_run

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
