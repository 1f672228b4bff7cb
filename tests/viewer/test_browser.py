"""The page in a real browser: every control, keys, hovering, themes, tables, and 2,000 items."""

import importlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import page_contents as pages
import pytest
from PIL import Image

from jaxid.viewer.page import write_page
from jaxid.viewer.serve import server

pytestmark = pytest.mark.browser

PATIENCE_MS = 200
"""The most that an interaction may take with 2,000 items."""


def browser_path() -> str | None:
    """A Chromium on this machine; None leaves the choice to Playwright."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # Not a plain import: the extra is not needed for anything else, type checks included.
    with importlib.import_module("playwright.sync_api").sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """A page with all it said and asked for."""

    def __init__(self, browser: Any, url: str, **options: Any):
        self.page = browser.new_page(viewport={"width": 1400, "height": 1000}, **options)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("html[data-ready=true]", timeout=60_000)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def selected(self) -> str:
        """The question of the selected row."""
        return self.page.inner_text('.row[aria-selected="true"] .text')

    def heat(self) -> np.ndarray:
        return np.array(self.page.evaluate("document.getElementById('heat').data[0].z.map((row) => Array.from(row))"))

    def close(self, url: str) -> None:
        """Closes it, having said nothing and asked for nothing but itself."""
        self.page.close()
        assert self.said == []
        assert [one for one in self.asked if not one.startswith(("data:", "blob:"))] == [url]


def test_a_run(browser: Any, tmp_path: Path) -> None:
    run = pages.swap()
    url = write_page(tmp_path / "view.html", [run]).as_uri()
    opened = Opened(browser, url)
    page = opened.page
    assert run.after is not None
    lead = (run.after[..., 0] - run.after[..., 1]) - (run.before[..., 0] - run.before[..., 1])
    assert opened.text("#count") == "6 of 6 items"
    assert opened.text("#question") == run.items[0].question
    np.testing.assert_allclose(opened.heat(), lead[0], atol=1e-3)
    assert page.locator(".token.edited").all_inner_texts() == ["star"]
    assert "changed" in opened.text("#answers") and "“right”" in opened.text("#answers")

    page.locator("#layer").fill("1")  # the slider
    assert opened.text("#layerName") == "1" and "changed" not in opened.text("#answers")
    turned = page.evaluate("document.getElementById('plane').data.at(-1).x")
    page.locator("#layer").fill("4")
    assert page.evaluate("document.getElementById('plane').data.at(-1).x") != turned
    assert run.plane is not None
    np.testing.assert_allclose(
        page.evaluate("document.getElementById('plane').data.at(-1).x"), run.plane.points[4, 0, :, 0], atol=1e-3
    )
    page.select_option("#group", "1")
    np.testing.assert_allclose(
        page.evaluate("document.getElementById('plane').data.at(-1).y"), run.plane.points[4, 1, :, 1], atol=1e-3
    )

    page.select_option("#axis-0", label="noise")  # the condition
    assert page.locator(".token.edited").all_inner_texts() == ["Is", "star"]
    assert "changed" not in opened.text("#answers")
    page.select_option("#axis-0", label="belief")

    page.select_option("#value", label="belief swapped")
    np.testing.assert_array_equal(opened.heat(), run.values[0].values[0])
    page.select_option("#over", "mean")
    np.testing.assert_allclose(opened.heat(), run.values[0].values.mean(axis=0), atol=1e-6)
    page.select_option("#filter", "flipped")
    assert opened.text("#count") == "3 of 6 items"
    np.testing.assert_allclose(opened.heat(), run.values[0].values[::2].mean(axis=0), atol=1e-6)
    page.select_option("#filter", "wrong")  # before the edit all say left
    assert opened.text("#count") == "3 of 6 items"
    page.select_option("#filter", "all")
    page.select_option("#over", "item")
    page.select_option("#value", "0")

    page.select_option("#sort", "down")
    order = page.evaluate("state.listed")
    assert order == np.argsort(-np.abs(lead[:, 0, 4]), kind="stable").tolist()
    page.fill("#least", "1")
    assert opened.text("#count") == "3 of 6 items"
    page.fill("#least", "0")
    page.fill("#search", "FISH 3")
    assert opened.text("#count") == "1 of 6 items"
    page.fill("#search", "")
    page.select_option("#sort", "file")

    page.locator(".row").nth(3).click()
    assert opened.text("#question") == run.items[3].question == opened.selected()
    np.testing.assert_allclose(opened.heat(), lead[3], atol=1e-3)
    image = page.locator("#picture")
    assert image.evaluate("image => image.naturalWidth") == 24
    opened.close(url)


def test_keys_tables_and_themes(browser: Any, tmp_path: Path) -> None:
    run = pages.steering()
    url = write_page(tmp_path / "view.html", [run, pages.geometry()]).as_uri()
    opened = Opened(browser, url, color_scheme="light")
    page = opened.page

    def chosen() -> list[int]:
        return page.evaluate("[state.item, ...state.chosen]")

    assert chosen() == [0, 1, 0, 0]
    for key, expected in (
        ("j", [1, 1, 0, 0]),
        ("k", [0, 1, 0, 0]),
        ("l", [0, 2, 0, 0]),
        ("l", [0, 2, 0, 0]),
        ("h", [0, 1, 0, 0]),
        ("r", [0, 1, 0, 1]),
        ("r", [0, 1, 0, 2]),
        ("e", [0, 1, 0, 1]),
    ):
        page.keyboard.press(key)
        assert chosen() == expected, key
    page.focus("#list")
    for key, item in (("ArrowDown", 1), ("End", 3), ("ArrowUp", 2), ("Home", 0), ("PageDown", 3)):
        page.keyboard.press(key)
        assert chosen()[0] == item, key
    assert page.get_attribute("#list", "aria-activedescendant") == "row-3"

    page.keyboard.press("t")
    assert page.get_attribute("#tables", "aria-pressed") == "true"
    rows = page.locator("#tableBox table").first.locator("tbody tr")
    assert rows.count() == 16 and rows.nth(6).inner_text().split() == ["1,2", "48.000", "48.400", "48.800"]
    cells = page.locator("#tableBox table").nth(1)
    assert cells.locator("caption").inner_text() == "The same by cell, layer 1"
    assert cells.locator("tbody tr").nth(2).inner_text().split()[-1] == "128.400"
    page.keyboard.press("t")
    assert page.locator("#tableBox").is_hidden()

    grounds = []
    for theme in ("light", "dark", "auto"):
        page.keyboard.press("d")
        assert opened.text("#theme") == f"Theme: {theme}"
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] == grounds[2] == "rgb(255, 255, 255)" and grounds[1] == "rgb(20, 23, 28)"
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-theme=dark]")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("/")
    page.keyboard.type("jk")  # letters in a field are no keys
    assert page.input_value("#search") == "jk" and opened.text("#count") == "0 of 4 items"

    page.select_option("#content", "1")
    assert page.locator("#sidebar").is_hidden() and page.locator("#plane").is_visible()
    page.locator("#layer").fill("3")
    assert "after layer 3" in opened.text("#planeCaption")
    opened.close(url)


def test_charts_are_clicked_and_hovered(browser: Any, tmp_path: Path) -> None:
    url = write_page(tmp_path / "view.html", [pages.steering()]).as_uri()
    opened = Opened(browser, url)
    page = opened.page
    plot = page.locator("#cells .nsewdrag").bounding_box()

    def over(column: float, row: float) -> tuple[float, float]:
        return plot["x"] + (column + 0.5) / 4 * plot["width"], plot["y"] + (row + 0.5) / 4 * plot["height"]

    # What is drawn has the colours of the numbers: white at 0, and red the more the larger they are.
    drawn = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), int)
    places = np.rint([over(column, 1.3) for column in range(4)]).astype(int)
    shades = drawn[places[:, 1], places[:, 0]]
    assert (np.diff(shades.sum(axis=1)) < 0).all()
    assert shades[0].min() > 220 and shades[3, 0] > 150 and shades[3, 1:].max() < 90
    page.mouse.move(*over(3, 1))
    page.wait_for_selector("#cells .hoverlayer .hovertext")
    assert page.locator("#cells .hoverlayer").text_content() == "column 3row 131.100 nats"
    page.mouse.click(*over(3, 1))
    page.wait_for_function("state.chosen.join() === '1,3,1'")
    opened.close(url)


def test_dense_maps(browser: Any, tmp_path: Path) -> None:
    maps = pages.maps()
    url = write_page(tmp_path / "view.html", [maps]).as_uri()
    opened = Opened(browser, url)
    page = opened.page
    assert opened.text("#question") == maps.captions[1]  # the one with the highest score
    assert "score 1.500 (the highest) · pooled cosine 0.200" in opened.text("#answers")
    page.get_by_role("button", name="fish").click()
    box = page.locator("#overlay").bounding_box()
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.5 * box["height"])
    assert opened.text("#hover") == "column 0, row 1: 4.000"
    colours = page.evaluate(
        "Array.from(document.getElementById('overlay').getContext('2d').getImageData(0, 0, 3, 3).data)"
    )
    shown = np.array(colours).reshape(9, 4)[:, :3]
    assert (shown[3] != shown[0]).any() and (np.delete(shown, 3, axis=0) == shown[0]).all()
    assert page.locator("button.token[disabled]").all_inner_texts() == ["above"]
    page.keyboard.press("r")  # the next word that has a map
    assert page.locator("button.token.edited").inner_text() == "a"
    page.keyboard.press("k")
    assert opened.text("#question") == maps.captions[0]
    opened.close(url)


def test_two_thousand_items_stay_responsive(browser: Any, tmp_path: Path) -> None:
    run = pages.swap(2_000, 32)
    url = write_page(tmp_path / "view.html", [run]).as_uri()
    opened = Opened(browser, url)
    page = opened.page
    page.evaluate(
        """void (window.timed = (change) => {
             const start = performance.now();
             change();
             document.body.getBoundingClientRect();
             return performance.now() - start;
           })"""
    )
    page.evaluate("timed(() => $('layer').dispatchEvent(new Event('input')))")  # the first call compiles
    actions = {
        "layer": "() => { $('layer').value = 20; $('layer').oninput(); }",
        "next item": "() => step(1)",
        "search": "() => { $('search').value = '19'; $('search').oninput(); }",
        "no search": "() => { $('search').value = ''; $('search').oninput(); }",
        "sort": "() => { $('sort').value = 'down'; $('sort').onchange(); }",
        "sort by the largest": "() => { $('sort').value = 'anywhere'; $('sort').onchange(); }",
        "filter": "() => { $('filter').value = 'flipped'; $('filter').onchange(); }",
        "all": "() => { $('filter').value = 'all'; $('filter').onchange(); }",
        "mean": "() => { $('over').value = 'mean'; $('over').onchange(); }",
        "layer of the mean": "() => { $('layer').value = 3; $('layer').oninput(); }",
        "value": "() => { $('value').value = 3; $('value').onchange(); }",
        "theme": "() => $('theme').click()",
        "scroll": "() => { $('list').scrollTop = 40000; drawRows(); }",
    }
    taken = {}
    for name, action in actions.items():
        taken[name] = min(page.evaluate(f"timed({action})") for _ in range(4))
    assert {name: took for name, took in taken.items() if took > PATIENCE_MS} == {}
    assert page.locator(".row").count() < 60  # of 2,000: only those in view
    opened.close(url)


def test_served_on_the_loopback_interface_only(browser: Any, tmp_path: Path) -> None:
    import threading

    page = write_page(tmp_path / "view.html", [pages.geometry()])
    with server(page, 0) as running:
        assert running.server_address[0] == "127.0.0.1"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/"
        opened = Opened(browser, url)
        assert opened.text("#planeCaption").startswith("IDs of all objects")
        assert opened.page.request.get(f"{url}other").status == 404
        opened.close(url)
        running.shutdown()
