"""The page of a run in a real browser, on a phone and on a desktop: it opens, complains of nothing, shows its pictures.

Needs Debian's chromium and chromedriver; `make test-browser` installs them and leaves screenshots in runs/browser.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from ldm_scale.__main__ import main
from tests.helpers.reported import CANARY, trained_run

WIDTHS = {"phone": (390, 844), "desktop": (1440, 900)}
SCREENSHOTS = Path(__file__).parents[2] / "runs" / "browser"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each stage."""
    written = {}
    for stage in ("autoencoder", "diffusion"):
        run = trained_run(tmp_path_factory.mktemp(stage), stage)
        assert main(["report", str(run)]) == 0
        written[stage] = run / "report.html"
    return written


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = Options()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)  # root and containers have neither the sandbox nor much shared memory
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = shutil.which("chromedriver")
    assert options.binary_location, "chromium is missing: run `make test-browser` as root"
    assert driver, "chromedriver is missing: run `make test-browser` as root"
    with webdriver.Chrome(options, Service(driver)) as started:
        started.set_page_load_timeout(60)
        yield started


def _open(browser: webdriver.Chrome, page: Path, device: str, scheme: str) -> None:
    width, height = WIDTHS[device]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": device == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("browser")  # what came before
    browser.get(page.as_uri())


def _keep(browser: webdriver.Chrome, name: str) -> None:
    """Nothing; the whole page, as it stands, is a picture."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    metrics = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": metrics["width"], "height": min(metrics["height"], 16000), "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    (SCREENSHOTS / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_the_page_opens_and_shows_its_pictures(
    pages: dict[str, Path], browser: webdriver.Chrome, stage: str, device: str, scheme: str
) -> None:
    _open(browser, pages[stage], device, scheme)
    _keep(browser, f"{stage}-{device}-{scheme}")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.readyState") == "complete"
    width = WIDTHS[device][0]
    assert browser.execute_script("return window.innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    # Earlier pictures and the rest of the figures are behind a click.
    browser.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "it scrolls sideways, open"
    for picture in _boxes(browser, "img"):
        assert picture["natural"] > 0, picture
        assert picture["width"] >= min(picture["natural"], 100), picture
        assert 0 <= picture["left"] < picture["right"] <= width, picture
    charts = _boxes(browser, ".chart svg")
    assert len(charts) > 10
    assert all(chart["height"] > 10 and 0 <= chart["left"] < chart["right"] <= width for chart in charts)
    letters = browser.execute_script(
        "return [...document.querySelectorAll('.chart svg text')].map(x => x.getBoundingClientRect().height)"
    )
    assert min(letters) >= 9, "the axes' numbers can be read"


def _boxes(browser: webdriver.Chrome, selector: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(x => {const b = x.getBoundingClientRect();"
        "return {natural: x.naturalWidth, left: b.left, right: b.right, width: b.width, height: b.height}})",
        selector,
    )
    assert found, f"the page has no {selector}"
    return found


def test_what_the_texts_hold_never_runs(pages: dict[str, Path], browser: webdriver.Chrome) -> None:
    for page in pages.values():
        _open(browser, page, "desktop", "light")
        assert browser.execute_script("return window.canary") is None
        assert browser.execute_script("return document.querySelectorAll('script, [onerror], [onload]').length") == 0
        assert CANARY in browser.execute_script("return document.querySelector('h1').textContent")
        assert CANARY in browser.title


def test_the_browser_would_have_told(tmp_path: Path, browser: webdriver.Chrome) -> None:
    """The checks above can fail: a page that runs the canary, loads a picture in vain and is too wide."""
    page = tmp_path / "bad.html"
    page.write_text(f"<title>{CANARY}<img src='missing.png'><div style='width: 3000px'>wide</div>")
    _open(browser, page, "phone", "light")
    assert browser.execute_script("return window.canary") == 1
    assert [entry["level"] for entry in browser.get_log("browser")].count("SEVERE") >= 1
    assert browser.execute_script("return document.documentElement.scrollWidth") > 390
    assert 0 in [picture["natural"] for picture in _boxes(browser, "img")]
