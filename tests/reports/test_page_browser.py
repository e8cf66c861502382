"""The page in headless Chromium, at the width of a desk and of a phone: it loads, sorts, filters, and hides arms.

The system's own browser is driven (nothing is downloaded); where there is none, these tests are skipped, visibly.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports.folders import write_curves, write_details, write_run, write_sequence

from crossft.reports.page import write_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here: the page is not looked at in a browser")
ARMS = {"full": (0.80, 0.70), "l2sp": (0.78, 0.95), "probe": (0.55, 0.99), "worse": (0.5, 0.6)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    for arm, (target, source) in ARMS.items():
        for seed in range(3):
            folder = write_run(root / "pacs", arm, seed, target + seed / 100, source + seed / 200)
            write_curves(folder)
            write_details(folder, {"l2sp": 0.1, "worse": 1.0}.get(arm), shift=seed / 50)
            write_sequence(folder, shift=seed / 50)
    write_run(root / "pacs", "probe", 9, None, None, status="failed", error="TrainingError: the loss is NaN at step 3")
    return write_page([root], root / "page.html", baseline="full")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desk", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, file: Path) -> Iterator[Any]:
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(file.as_uri())
    yield page
    assert said == []
    assert asked == [file.as_uri()], "the page asks for nothing but itself"
    page.close()


def column(page: Any, table: str, number: int) -> list[str]:
    rows = page.query_selector_all(f".{table} tbody tr")
    return [row.query_selector_all("td")[number].inner_text().strip() for row in rows if row.is_visible()]


def test_a_heading_sorts_up_and_down(page: Any) -> None:
    head = page.locator(".arms.table thead th").nth(2)
    head.locator("button").click()
    up = [float(text.split()[0]) for text in column(page, "arms.table", 2)]
    assert up == sorted(up)
    assert len(set(up)) == 4
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").press("Enter")
    assert [float(text.split()[0]) for text in column(page, "arms.table", 2)] == up[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    page.locator(".arms.table thead th button").first.click()
    assert [name.split()[0] for name in column(page, "arms.table", 0)] == sorted(ARMS)
    status = page.locator(".runs.table thead th", has_text="target accuracy")
    status.locator("button").click()
    assert column(page, "runs.table", 2)[-1] == "failed", "what has no number stands last"


def test_a_filter_keeps_the_rows_with_all_its_words(page: Any) -> None:
    field, told = page.locator(".runs.table input"), page.locator(".runs.table output")
    assert told.inner_text() == "13 rows"
    field.fill("PROBE finished")
    assert column(page, "runs.table", 1) == ["probe"] * 3
    assert told.inner_text() == "3 of 13 rows"
    field.fill("nan at step")
    assert column(page, "runs.table", 2) == ["failed"]
    field.fill("no such run")
    assert column(page, "runs.table", 0) == []
    field.fill("")
    assert told.inner_text() == "13 rows"


def test_a_chip_hides_its_arm_in_charts_and_tables(page: Any) -> None:
    chip = page.locator(".chip", has_text="l2sp")
    arm = chip.get_attribute("data-arm")
    drawn = page.locator(f'main svg [data-arm="{arm}"]')
    assert drawn.count() > 8, "the trade-off, four metrics, three curves, two domains' calibration"
    assert drawn.first.is_visible()
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert not any(drawn.nth(i).is_visible() for i in range(drawn.count()))
    assert sorted(n.split()[0] for n in column(page, "arms.table", 0)) == ["full", "probe", "worse"]
    assert page.locator(".runs.table output").inner_text() == "10 of 13 rows"
    page.locator(".chip.all").click()
    assert page.locator(".runs.table output").inner_text() == "0 of 13 rows"
    page.locator(".chip.all").click()
    assert page.locator(".runs.table output").inner_text() == "13 rows"
    assert drawn.first.is_visible()


def test_pointing_at_an_arm_tells_its_numbers(page: Any) -> None:
    dot = page.locator("figure.tall svg .arm .dot").first
    dot.scroll_into_view_if_needed()
    dot.hover(force=True)
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert "source retention: after / before: 0.7" in tip.inner_text()
    assert "(n=3)" in tip.inner_text()
    box = tip.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= page.viewport_size["width"]


def test_colors_follow_the_system_until_they_are_chosen(page: Any) -> None:
    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = paper()
    page.emulate_media(color_scheme="dark")
    dark = paper()
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(13, 17, 23)")
    button = page.locator("#theme")
    button.click()
    assert (button.inner_text(), paper()) == ("light", light)
    button.click()
    page.emulate_media(color_scheme="light")
    assert (button.inner_text(), paper()) == ("dark", dark)
    button.click()
    assert (button.inner_text(), paper()) == ("auto", light)


CLASHES = """() => [...document.querySelectorAll("main svg")].flatMap(svg => {
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
  const frame = svg.getBoundingClientRect();
  const outside = texts.filter(([, b]) => b.left < frame.left - 1 || b.right > frame.right + 1);
  const cross = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  const over = texts.flatMap(([t, a], i) => texts.slice(i + 1).filter(([, b]) => cross(a, b)).map(([u]) => [t, u]));
  return [...outside.map(([t]) => ["outside", t]), ...over];
})"""
"""Texts of charts that leave their chart, and pairs that cover each other."""


def test_nothing_overflows_and_no_text_covers_another(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= page.viewport_size["width"], "wide tables scroll inside their frames"
    assert page.locator("main svg text").count() > 60
    assert page.evaluate(CLASHES) == []
