"""The page in a real browser: a headless Chromium, from the keyboard, in light and dark, on a small screen."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import numpy as np
import pytest
from page_probe import CONTRASTS, FAULTS, Watch
from page_stores import SCRIPT
from PIL import Image
from playwright.sync_api import Browser, ElementHandle, Page, sync_playwright
from programs import needs_program

pytestmark = needs_program("chromium")

PAGES = {
    "adapters": "/",
    "nothing found": "/?name=nothing",
    "bad condition": "/?metric=%3E%3E",
    "name": "/adapters/sentiment",
    "version": "/adapters/sentiment@v3",
    "hostile": "/adapters/hostile@v1",
    "metrics": "/metrics/sentiment",
    "hostile metrics": "/metrics/hostile",
    "lineage": "/lineage/polite@v1",
    "hostile lineage": "/lineage/hostile@v1",
    "fidelity": "/fidelity/sentiment@v3",
    "hostile fidelity": "/fidelity/hostile@v1",
    "diff": "/diff?a=sentiment%40v1&b=sentiment%40v3",
    "hostile diff": "/diff?a=sentiment%40v1&b=hostile%40v1",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def watch(browser: Browser, site: str) -> Iterator[Watch]:
    """Opens pages, and fails where one logs an error, asks another host, or gets no answer."""
    watch = Watch(browser, site)
    yield watch
    watch.close()
    assert watch.faults == []


def _colours(element: ElementHandle) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB"), dtype=float)


def test_what_is_watched_is_seen(browser: Browser, site: str) -> None:
    watch = Watch(browser, site)
    page = watch.open("/nowhere")
    page.evaluate("fetch('http://localhost:9/').catch(() => 0)")
    page.evaluate("document.body.append(Object.assign(document.createElement('img'), {src: '/also-nowhere'}))")
    page.wait_for_timeout(300)
    watch.close()
    assert any("404" in fault for fault in watch.faults)
    assert any("localhost:9" in fault for fault in watch.faults)
    page = watch.open("/")
    page.evaluate("document.querySelector('h1').outerHTML = '<h3>x</h3><img src=/static/icon.svg><input id=a><p id=a>'")
    found = page.evaluate(FAULTS)
    for fault in ("h1", "alt", "label", "id a"):
        assert any(fault in each for each in found), fault
    page.evaluate("document.querySelector('footer p').style.color = '#909090'")
    assert page.evaluate(CONTRASTS)
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.evaluate("document.querySelector('footer p').style.minWidth = '500px'")
    assert page.evaluate("document.documentElement.scrollWidth") > 360
    watch.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES)
def test_structure_contrast_and_width(watch: Watch, path: str, scheme: str) -> None:
    watch.expected = {400, 404, 422} if path.startswith("/diff?a=sentiment%40v1&b=hostile") else set()
    page = watch.open(path, scheme, width=360)
    assert page.evaluate(FAULTS) == []
    assert page.evaluate(CONTRASTS) == []
    for width in (360, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title().endswith(" · adapter store")
    assert "owned" not in page.title()


def test_light_and_dark_differ(watch: Watch) -> None:
    looks = {}
    for scheme in ("light", "dark"):
        page = watch.open("/metrics/sentiment", scheme)
        background, ink = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        picture = page.wait_for_selector("figure img")
        assert picture is not None
        colours = _colours(picture)
        assert colours.mean() > 200 if scheme == "light" else colours.mean() < 60
        assert abs(colours - colours[0, 0]).sum(-1).max() > 200, "nothing is drawn"
        looks[scheme] = (background, ink)
    assert looks["light"][0] != looks["dark"][0]
    assert looks["light"][1] != looks["dark"][1]


def _tab_to(page: Page, selector: str, limit: int = 120) -> None:
    """Press Tab until the element has the focus, which has to show."""
    for _ in range(limit):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            break
    else:
        raise AssertionError(f"Tab does not reach {selector}")
    style = page.evaluate(
        "(() => { const s = getComputedStyle(document.activeElement);"
        "return [s.outlineStyle, parseFloat(s.outlineWidth)] })()"
    )
    assert style[0] == "solid" and style[1] >= 2
    box = page.evaluate(
        "(() => { const b = document.activeElement.getBoundingClientRect();return [b.top, b.bottom, innerHeight] })()"
    )
    assert box[0] < box[2] and box[1] > 0, "the focus is out of sight"


def test_from_the_list_to_a_difference_by_keyboard(watch: Watch) -> None:
    page = watch.open("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    page.keyboard.press("Enter")
    _tab_to(page, "#name")
    page.keyboard.type("senti")
    _tab_to(page, "#metric")
    page.keyboard.type("accuracy>0.8")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?name=senti*")
    assert page.locator("tbody tr").count() == 1
    _tab_to(page, "a[href='/adapters/sentiment']")
    page.keyboard.press("Enter")
    page.wait_for_url("**/adapters/sentiment")
    _tab_to(page, "select[name=a]")
    page.keyboard.press("End")
    assert page.locator("select[name=a]").input_value() == "sentiment@v1"
    _tab_to(page, "form[action='/diff'] button")
    page.keyboard.press("Enter")
    page.wait_for_url("**/diff?a=sentiment%40v1&b=sentiment%40v3")
    assert "From sentiment@v1 to sentiment@v3" in page.inner_text("main")
    assert page.locator("ins").count() > 0


def test_the_keyboard_is_never_caught(watch: Watch) -> None:
    page = watch.open("/adapters/sentiment@v3")
    seen = []
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        seen.append(page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
    else:
        raise AssertionError("Tab never leaves the page")
    assert seen == sorted(set(seen)), "the focus does not go in the order of the page"
    assert len(seen) > 20


def test_tables_scroll_by_keyboard_within_their_region(watch: Watch) -> None:
    page = watch.open("/", width=360)
    region = page.locator(".scroll").first
    assert region.evaluate("e => e.scrollWidth > e.clientWidth")
    _tab_to(page, ".scroll")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.scroll').scrollLeft > 20")
    assert page.evaluate("scrollX") == 0


def test_the_lineage_is_drawn_and_leads_on(watch: Watch) -> None:
    page = watch.open("/lineage/polite@v1")
    boxes = {node.text_content() or "": node.bounding_box() for node in page.locator(".graph .node").all()}
    names = {name.split("@")[0]: box for name, box in boxes.items()}
    assert set(names) == {"sentiment", "tone", "polite", "team/exported"}
    assert all(box is not None and box["width"] > 100 and box["height"] > 30 for box in names.values())
    assert names["sentiment"]["x"] < names["polite"]["x"] < names["team/exported"]["x"]
    region = page.locator(".graph").bounding_box()
    assert region is not None
    for box in names.values():
        assert region["x"] <= box["x"] and box["x"] + box["width"] <= region["x"] + region["width"]
    lines = [path.bounding_box() for path in page.locator(".graph .edge path").all()]
    assert len(lines) == 3
    assert all(line is not None and line["width"] > 50 for line in lines)
    assert page.locator(".tree li").count() == 3
    _tab_to(page, ".graph a[href='/adapters/sentiment@v3']")
    page.keyboard.press("Enter")
    page.wait_for_url("**/adapters/sentiment@v3")


@pytest.mark.parametrize(
    ("path", "pictures"),
    [("/metrics/sentiment", 2), ("/fidelity/sentiment@v3", 3), ("/diff?a=sentiment@v1&b=sentiment@v3", 1)],
)
def test_pictures_are_drawn(watch: Watch, path: str, pictures: int) -> None:
    page = watch.open(path)
    found = page.query_selector_all("figure img")
    assert len(found) == pictures
    for picture in found:
        picture.scroll_into_view_if_needed()
        page.wait_for_function("image => image.complete && image.naturalWidth > 100", arg=picture)
        box = picture.bounding_box()
        assert box is not None and box["width"] > 250 and box["height"] > 120
        pixels = _colours(picture)
        saturated = (pixels.max(-1) - pixels.min(-1)) > 60
        assert saturated.sum() > 200, "no coloured line is drawn"
    assert page.locator("table").count() > 0


def test_hostile_texts_are_shown_as_texts(watch: Watch) -> None:
    page = watch.open("/adapters/hostile@v1")
    assert SCRIPT in page.inner_text("main")
    assert "\\x1b[31m\\u202e" in page.inner_text("main")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert page.title() == "hostile@v1 · adapter store"
    page = watch.open("/lineage/hostile@v1")
    assert page.locator("main a[href^='javascript']").count() == 0
    assert page.locator("script").count() == 1


def test_scripts_are_refused_even_if_one_got_in(watch: Watch) -> None:
    page = watch.open("/")
    watch.expected = {"Content Security Policy"}
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=/static/icon.svg onload=\"document.title=1\">')"
    )
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title=1'}))")
    page.wait_for_timeout(200)
    assert page.title() == "Adapters · adapter store"


def test_commands_are_copied(watch: Watch) -> None:
    page = watch.open("/adapters/sentiment@v3")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    _tab_to(page, ".command button")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.activeElement.textContent === 'Copied'")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.locator(".command pre").first.inner_text()
    assert "sentiment@v3" in copied


def test_without_scripts_everything_is_there(browser: Browser, site: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site}/adapters/sentiment@v3")
    assert "reft serve tiny-llama --adapter sentiment=sentiment@v3" in page.locator(".use").nth(1).inner_text()
    page.click("text=Compare")
    assert urlsplit(page.url).path == "/diff"
    assert "From sentiment@v3" in page.inner_text("main")
    context.close()
