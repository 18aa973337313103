"""The report in a real browser: it renders, fits a phone, sorts and turns dark, and loads nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.degenerate_sweeps import hostile, with_nulls
from support.sweep_example import sweep

from patcher.report.page.page import write_report
from patcher.report.pictures import style
from patcher.report.pictures.drawing import draw_all

REQUIRED = os.environ.get("PATCH_MODEL_REQUIRE_BROWSER") == "1"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage"
)


def _missing(reason: str) -> None:
    if REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    try:
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        _missing("selenium is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        _missing("no Chromium with its chromedriver on the path (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        found = webdriver.Chrome(options=options, service=Service(driver))
    except WebDriverException as error:
        _missing(f"Chromium does not start: {(error.msg or '').strip().splitlines()[:1]}")
    yield found
    found.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    before, style.DOTS = style.DOTS, 40
    pictures = draw_all(sweep(), folder / "pictures", names=["controls", "effect_by_layer"])
    style.DOTS = before
    found = {}
    for name, content in (("full", sweep()), ("hostile", hostile()), ("nulls", with_nulls())):
        found[name] = folder / f"{name}.html"
        write_report(content, pictures if name != "nulls" else {}, found[name])
    return found


def show(browser, path: Path, *, width: int = 1280, scheme: str = "light") -> None:
    browser.get_log("browser")
    browser.get_log("performance")
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())


def column(browser, table: str, title: str) -> list[float | None]:
    return browser.execute_script(
        """const table = document.getElementById("table-" + arguments[0]);
        const header = [...table.tHead.rows[0].cells].find((cell) => cell.textContent === arguments[1]);
        return [...table.tBodies[0].rows].map((row) => {
          const key = row.cells[header.cellIndex].dataset.key;
          return key === undefined ? row.cells[header.cellIndex].textContent : key === "" ? null : Number(key);
        });""",
        table,
        title,
    )


def header(browser, table: str, title: str):
    found = browser.find_elements("css selector", f"#table-{table} th")
    return next(cell for cell in found if cell.get_property("textContent") == title)


def press(browser, table: str, title: str, *, key: str | None = None) -> str:
    """Click a header, or focus it and press a key; returns its aria-sort."""
    cell = header(browser, table, title)
    button = cell.find_element("css selector", "button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", button)
    if key is None:
        button.click()
    else:
        button.send_keys(key)
    return cell.get_attribute("aria-sort")


@pytest.mark.parametrize("name", ["full", "hostile", "nulls"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_renders_without_errors_and_without_sideways_scrolling(browser, pages, name, width):
    show(browser, pages[name], width=width)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    sent = [
        entry["message"] for entry in browser.get_log("performance") if "Network.requestWillBeSent" in entry["message"]
    ]
    assert not any('"url":"http' in message for message in sent)
    broken = "return [...document.images].filter((image) => !image.complete || image.naturalWidth === 0).length"
    assert browser.execute_script(broken) == 0
    assert browser.find_element("css selector", "h1").is_displayed()
    if name == "hostile":
        assert "owned" not in browser.title.replace("document.title='owned'", "")
        assert browser.execute_script("return document.scripts.length") == 1
        assert browser.execute_script("return document.querySelectorAll('[onerror]').length") == 0


def test_a_wide_table_scrolls_in_its_own_box(browser, pages):
    show(browser, pages["full"], width=390)
    inner, outer = browser.execute_script(
        "const box = document.getElementById('table-grid').parentElement; return [box.scrollWidth, box.clientWidth]"
    )
    assert inner > outer + 200 and outer < 390


def test_a_header_sorts_by_number_and_back(browser, pages):
    show(browser, pages["full"])
    before = column(browser, "grid", "effect")
    assert before != sorted(before)
    assert press(browser, "grid", "effect") == "ascending"
    assert column(browser, "grid", "effect") == sorted(before)
    assert press(browser, "grid", "effect") == "descending"
    assert column(browser, "grid", "effect") == sorted(before, reverse=True)
    # 0.5, 1, 2 ... as numbers; as text 10 would come before 2.
    assert press(browser, "grid", "layer") == "ascending"
    layers = column(browser, "grid", "layer")
    assert layers == sorted(layers) and {2, 10} <= set(layers)
    assert header(browser, "grid", "effect").get_attribute("aria-sort") is None


def test_rows_that_are_equal_keep_their_order(browser, pages):
    show(browser, pages["full"])
    press(browser, "grid", "effect")
    for way in (1, -1):
        press(browser, "grid", "layer")
        found = list(zip(column(browser, "grid", "layer"), column(browser, "grid", "effect"), strict=True))
        assert found == sorted(found, key=lambda row: (way * row[0], row[1]))


def test_text_sorts_as_text_and_the_keyboard_works(browser, pages):
    from selenium.webdriver.common.keys import Keys

    show(browser, pages["full"])
    names = column(browser, "report", "what")
    assert press(browser, "report", "what", key=Keys.ENTER) == "ascending"
    assert column(browser, "report", "what") == sorted(names)
    assert press(browser, "report", "what", key=Keys.SPACE) == "descending"
    assert column(browser, "report", "what") == sorted(names, reverse=True)
    assert browser.find_element("id", "sorted").get_property("textContent") == "sorted by what, descending"


def test_what_is_absent_stays_last_both_ways(browser, pages):
    show(browser, pages["nulls"])
    before = column(browser, "grid", "KL, nats a token")
    absent = before.count(None)
    present = [value for value in before if value is not None]
    assert absent > 5
    for reverse in (False, True):
        press(browser, "grid", "KL, nats a token")
        assert column(browser, "grid", "KL, nats a token") == sorted(present, reverse=reverse) + [None] * absent


def test_dark_and_light_follow_the_reader(browser, pages):
    looks = {}
    for scheme in ("light", "dark"):
        show(browser, pages["full"], scheme=scheme)
        looks[scheme] = browser.execute_script(
            "const style = getComputedStyle(document.body);"
            "return [style.backgroundColor, style.color, document.images[0].currentSrc]"
        )
    assert looks["light"][0] == "rgb(255, 255, 255)" and looks["dark"][0] == "rgb(21, 24, 29)"
    assert looks["light"][1] != looks["dark"][1]
    assert looks["light"][2] != looks["dark"][2] and looks["dark"][2].startswith("data:image/png")


def test_paper_is_light_and_shows_whole_tables(browser, pages):
    show(browser, pages["full"], scheme="dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    paper, height = browser.execute_script(
        "const box = getComputedStyle(document.getElementById('table-grid').parentElement);"
        "return [getComputedStyle(document.body).backgroundColor, box.maxHeight]"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    assert paper == "rgb(255, 255, 255)" and height == "none"
