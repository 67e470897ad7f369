"""The report in a real browser: it draws, says nothing in the console, asks the network for nothing, and answers to the mouse."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from jmt_dist.config import PackOptions
from jmt_dist.data.pack import pack
from jmt_dist.errors import UserError
from jmt_dist.evaluate.predict import write_predictions
from jmt_dist.report.content import Wishes
from jmt_dist.report.traces import NOTICE, RENDERED, unit_pictures
from jmt_dist.report.units import read_material
from jmt_dist.report.write import compare_run
from tests.data.tree import labels, write_tree
from tests.report.runfolder import make_fixture_json, make_run

JPEG = "data:image/jpeg;base64,/9j/"
UNIT, ROWS, SEED = "v6", 50, 6  # of tests.data.tree.write_tree


def make_shards(base, fixture):
    """Shards of a small tree, the fixture's or not; one unit lacks faces, one has 25 frames per second."""
    write_tree(base / "tree")
    for frame in (10, 11, 12):
        (base / "tree" / "cropped_aligned" / UNIT / f"{frame:05d}.jpg").unlink()
    if fixture:
        (base / "tree" / "fixture.json").write_text("{}")
    pack(PackOptions(source=str(base / "tree"), out=str(base / "shards"), workers=1), say=lambda line: None)
    return base / "shards"


def make_report(base, fixture=True, wishes=None):
    """A run with curves, and on its official fold predictions of the shards' validation units."""
    shards = make_shards(base, fixture)
    make_run(base / "run", folds=("official", "fold-1"), seeds=1, words=("name=demo", f"data.shards={shards}"))
    draw = np.random.default_rng(0)
    truth = {UNIT: labels(ROWS, SEED), "v7": labels(35, 7)}
    va = {unit: (0.5 * rows + draw.normal(0, 0.1, rows.shape)).astype(np.float32) for unit, rows in truth.items()}
    for name in ("jmt", "visual", "audio"):
        write_predictions(base / "run" / "official" / "evaluate" / f"{name}-seed0" / "predictions.parquet", va, truth)
    result = compare_run(base / "run", make_fixture_json(base / "fixture.json"), wishes)
    return base / "run" / "report.html", va, result


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    base = tmp_path_factory.mktemp("report")
    return (base, *make_report(base))


def test_material_of_units_is_what_packing_met(report):
    base, *_ = report
    material = read_material(base / "shards")
    assert material[UNIT].faces_missing == pytest.approx(3 / 50) and material[UNIT].fps == 30
    assert material["b.2"].fps == pytest.approx(25, abs=0.01) and material["e5"].fps == pytest.approx(15, abs=0.01)
    assert material["v7"].faces_missing == 0
    assert read_material(base / "nowhere") == {}
    line = next(row for row in (base / "run" / "units.csv").read_text().splitlines() if row.startswith(f"official,{UNIT},"))
    assert line.endswith(",0.06,30")


def test_pictures_are_of_their_frames(report):
    """The picture of a frame is that frame's crop; frames without a face have none."""
    import base64
    import io

    from PIL import Image

    base, *_ = report
    pictures = unit_pictures(base / "shards", UNIT)
    assert set(pictures) == set(range(1, ROWS + 1)) - {10, 11, 12}
    small = {}
    for frame in (1, 13, 30, 50):
        picture = Image.open(io.BytesIO(base64.b64decode(pictures[frame].split(",", 1)[1])))
        crops = {}
        for other in range(13, 21):  # eight different pictures, in turn
            crop = Image.open(base / "tree" / "cropped_aligned" / UNIT / f"{other:05d}.jpg").convert("RGB").resize(picture.size)
            crops[other % 8] = np.abs(np.asarray(crop).astype(float) - np.asarray(picture)).mean()
        small[frame] = min(crops, key=crops.get)
        assert crops[small[frame]] < 6 < sorted(crops.values())[1]
    assert small == {frame: frame % 8 for frame in small}


def test_faces_of_a_dataset_only_on_request(tmp_path):
    path, _, _ = make_report(tmp_path, fixture=False)
    assert JPEG not in path.read_text() and NOTICE not in path.read_text()
    result = compare_run(tmp_path / "run", None, Wishes(frames=True, units=("v7",)))
    text = path.read_text()
    assert text.count(JPEG) == 35 and NOTICE in text and RENDERED not in text
    assert not [line for line in result.omissions if "pictures" in line]
    with pytest.raises(UserError, match="does not validate on unit a1"):
        compare_run(tmp_path / "run", None, Wishes(units=("a1",)))
    with pytest.raises(UserError, match="there is no fold `fold-9`"):
        compare_run(tmp_path / "run", None, Wishes(fold="fold-9"))
    shutil.rmtree(tmp_path / "shards")
    result = compare_run(tmp_path / "run", None, Wishes(frames=True))
    assert any(line.startswith("pictures of units: there is no shard folder") for line in result.omissions)
    assert JPEG not in path.read_text() and 'class="unit bare"' in path.read_text()


@pytest.mark.browser
def test_report_answers_to_the_mouse(report, tmp_path):
    from playwright.sync_api import sync_playwright

    _, path, va, result = report
    assert [line for line in result.omissions if "not run" not in line] == []
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "the slow tier installs chromium"
    said, asked = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(Path(path).as_uri())
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 2 * Object.keys(figures).length")
        drawn = page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].map(plot => plot.querySelectorAll('path').length)")
        assert len(drawn) == page.evaluate("Object.keys(figures).length") == 8 and min(drawn) > 3
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        titles = page.eval_on_selector_all("h3", "all => all.map(one => one.textContent)")
        place = next(i for i, title in enumerate(titles) if title.startswith(f"{UNIT}:"))
        trace = page.locator(".unit").nth(place)
        trace.scroll_into_view_if_needed()
        box = trace.locator(".nsewdrag").first.bounding_box()
        known = page.evaluate("i => Object.values(pictures)[i]", place)
        seen = set()
        for frame in (1, 20, 50):
            x, y = box["x"] + 1 + (frame - 1) / (ROWS - 1) * (box["width"] - 2), box["y"] + box["height"] / 2
            for attempt in range(300):  # a busy machine draws late, and a mouse at rest says nothing
                page.mouse.move(x, y + attempt % 2)
                if trace.locator("p").text_content() == f"frame {frame}":
                    break
                page.wait_for_timeout(100)
            assert trace.locator("p").text_content() == f"frame {frame}"
            picture = trace.locator("img").get_attribute("src")
            assert picture == known[str(frame)]
            seen.add(picture)
            hover = " ".join(trace.locator(".hoverlayer").all_text_contents())
            for value in va[UNIT][frame - 1]:
                assert f"{value:.3f}" in hover.replace("−", "-")
        assert len(seen) == 3
        browser.close()
    assert said == [] and asked == [Path(path).as_uri()]
