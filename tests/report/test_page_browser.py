"""The page in a real browser. WebGL is drawn in software here, so each page takes seconds: few pages, several looks at each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from persona_ray.reduce.space_pair import SpacePair
from persona_ray.report.data import ReportData
from persona_ray.report.page import render_page
from persona_ray.spec import Reduced

MakeReduced = Callable[..., Reduced]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--enable-unsafe-swiftshader",
]
WIDE, NARROW = ViewportSize(width=1440, height=900), ViewportSize(width=420, height=900)
FOUND = "document.getElementById('map').data.find((trace) => trace.name === 'found').x"

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")]


@dataclass
class Watched:
    """All pages of this file, and what they did that they must not."""

    folder: Path
    pages: int = 0
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, browser: Browser, data: ReportData, size: ViewportSize = WIDE, **options: Any) -> Page:
        file = self.folder / f"page-{self.pages}.html"
        self.pages += 1
        file.write_text(render_page(data), encoding="utf-8")
        page = browser.new_context(viewport=size, **options).new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#map .point")
        return page


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return Watched(tmp_path_factory.mktemp("pages"))


@pytest.fixture(autouse=True)
def _well_behaved(watched: Watched) -> Iterator[None]:
    """After every test: no page has complained, and none has asked for anything but itself."""
    yield
    assert watched.complaints == []
    assert len(watched.requests) == watched.pages
    assert all(url.startswith("file:///") for url in watched.requests)


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Browser]]:
    with sync_playwright() as playwright:
        browsers: list[Browser] = []

        def start(*arguments: str) -> Browser:
            browsers.append(playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *arguments]))
            return browsers[-1]

        yield start
        for browser in browsers:
            browser.close()


@pytest.fixture(scope="module")
def browser(launch: Callable[..., Browser]) -> Browser:
    return launch()


@pytest.fixture(scope="module")
def shared_page(browser: Browser, watched: Watched, report: ReportData) -> Page:
    return watched.open(browser, report)


@pytest.fixture
def page(shared_page: Page) -> Page:
    """The report at its best layer, wide, light, nothing searched for."""
    resize(shared_page, WIDE)
    shared_page.emulate_media(color_scheme="light")
    shared_page.evaluate("document.getElementById('best-button').click()")
    shared_page.fill("#find", "")
    shared_page.mouse.move(0, 0)
    return shared_page


def resize(page: Page, size: ViewportSize) -> None:
    """Returns when the map has followed."""
    page.set_viewport_size(size)
    page.wait_for_function(
        "(width) => innerWidth === width && ((map) => map.layout.width === map.clientWidth)(document.getElementById('map'))",
        arg=size["width"],
    )


def map_points(page: Page) -> dict[str, list[float]]:
    points: dict[str, list[float]] = page.evaluate("(({x, y}) => ({x, y}))(document.getElementById('map').data[0])")
    return points


def text_of(page: Page, selector: str) -> str:
    return (page.text_content(selector) or "").strip()


@pytest.mark.parametrize("size", [WIDE, NARROW, ViewportSize(width=1000, height=700)], ids=["wide", "narrow", "between"])
def test_page_fits_its_window(page: Page, size: ViewportSize) -> None:
    resize(page, size)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    for figure in ("map", "variance", "line-cos", "line-ratio", "line-separation", "line-norm"):
        box = page.locator(f"#{figure} .main-svg").first.bounding_box()
        assert box is not None
        assert min(box["width"] / 2, box["height"]) > 100
        assert 0 <= box["x"] <= size["width"] - box["width"]
    assert page.locator("#rank li").count() == 13
    assert "66" in text_of(page, ".lead")


def test_layer_selector_moves_every_figure(page: Page) -> None:
    assert text_of(page, "#layer-number") == "2"
    before, ranking, variance = map_points(page), text_of(page, "#rank"), text_of(page, "#variance")
    page.focus("#layer")
    page.keyboard.press("ArrowLeft")
    assert text_of(page, "#layer-number") == "1"
    assert map_points(page) != before
    assert text_of(page, "#rank") != ranking
    assert text_of(page, "#variance") != variance
    assert page.get_attribute("#layer", "aria-valuetext") == "layer 1"
    page.click("#best-button")
    assert map_points(page) == before
    assert page.get_attribute("#layer", "aria-valuetext") == "layer 2, the best"


def test_click_on_a_layer_goes_there(page: Page) -> None:
    dots = page.locator("#line-cos .points").first.locator(".point")
    assert dots.count() == 4
    dots.nth(3).scroll_into_view_if_needed()
    box = dots.nth(3).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#line-cos .hoverlayer .hovertext")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function("document.getElementById('layer-number').textContent === '3'")


def test_map_names_archetypes_in_place_and_on_hover(page: Page) -> None:
    labels = page.locator("#map .textpoint").all_text_contents()
    assert "default (Assistant)" in labels
    assert {"role_0", "role_11"} <= set(labels)
    dot = page.locator("#map .points").first.locator(".point").first
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#map .hoverlayer .hovertext")
    assert "role_0" in text_of(page, "#map .hoverlayer .hovertext")
    assert "20 rows" in text_of(page, "#map .hoverlayer .hovertext")


def test_labels_of_a_crowded_map_do_not_cover_each_other(browser: Browser, watched: Watched, make_reduced: MakeReduced) -> None:
    data = ReportData(reduced=make_reduced(num_roles=275, num_layers=3, hidden=20), steering=None, run={})
    page = watched.open(browser, data)
    boxes = page.eval_on_selector_all(
        "#map .textpoint text",
        "texts => texts.filter((text) => text.textContent.trim()).map((text) => text.getBoundingClientRect().toJSON())",
    )
    assert len(boxes) >= 15
    for place, one in enumerate(boxes):
        for other in boxes[place + 1 :]:
            beside = one["right"] <= other["left"] + 1 or other["right"] <= one["left"] + 1
            # Boxes of texts are higher than their letters.
            assert beside or one["bottom"] <= other["top"] + 4 or other["bottom"] <= one["top"] + 4
    assert page.locator("#rank li").count() == 25
    page.click("#rank button")
    assert page.locator("#rank li").count() == 276


def test_names_follow_the_room_there_is(page: Page) -> None:
    names = page.locator("#map .textpoint text")
    wide = names.all_text_contents()
    for size in (NARROW, WIDE, NARROW):
        resize(page, size)
        shown = names.all_text_contents()
        assert "default (Assistant)" in shown
        assert len(shown) < len(wide) if size == NARROW else shown == wide


def test_find_marks_the_archetype_in_list_and_map(page: Page) -> None:
    page.fill("#find", "role_7")
    assert text_of(page, "#rank .found .name") == "role_7"
    marked = page.evaluate(FOUND)
    assert marked == [map_points(page)["x"][7]]
    page.fill("#find", "")
    assert page.evaluate(FOUND) == []


def test_third_dimension_is_drawn(page: Page) -> None:
    if not page.evaluate("Boolean(document.createElement('canvas').getContext('webgl'))"):
        pytest.skip("this chromium has no WebGL, not even in software")
    page.locator("#space").scroll_into_view_if_needed()
    page.wait_for_selector("#space canvas", timeout=60_000)
    assert page.evaluate("document.getElementById('space').data[0].z.length") == 12


def test_without_webgl_the_page_says_so_in_place(launch: Callable[..., Browser], watched: Watched, report: ReportData) -> None:
    page = watched.open(launch("--disable-3d-apis"), report)
    page.locator("#space").scroll_into_view_if_needed()
    page.wait_for_selector("#space .message")
    assert "WebGL" in text_of(page, "#space")


def test_hostile_names_stay_text(browser: Browser, watched: Watched, make_reduced: MakeReduced, report: ReportData) -> None:
    evil = [
        "</script><script>window.hacked=1</script>",
        '<img src="x" onerror="window.hacked=1">',
        '<a href="https://example.org">"&amp;"</a>',
    ]
    assert report.steering is not None
    example = replace(report.steering.examples[0], archetype=evil[0], answers={"none": evil[0], "+axis": evil[1]})
    run = {**report.run, "model_id": evil[1]}
    steering = replace(report.steering, examples=(example,))
    page = watched.open(browser, ReportData(reduced=make_reduced(num_roles=3, names=evil), steering=steering, run=run))
    assert page.evaluate("window.hacked") is None
    assert set(evil) <= set(page.locator("#rank .name").all_text_contents())
    assert set(evil) <= set(page.locator("#map .textpoint").all_text_contents())
    assert page.locator("#map .textpoint a").count() == 0
    assert evil[1] in text_of(page, "h1")


def test_policy_stops_what_the_page_never_asks_for(browser: Browser, report: ReportData, tmp_path: Path) -> None:
    # Chromium logs each refusal as an error, so this page is not among the watched ones.
    page = Watched(tmp_path).open(browser, report)
    stopped = page.evaluate(
        """() => new Promise((resolve) => {
          const found = [];
          document.addEventListener("securitypolicyviolation", (event) => {
            found.push(event.effectiveDirective);
            if (found.length === 2) resolve(found.sort());
          });
          const script = document.createElement("script");
          script.textContent = "window.hacked = 1";
          document.body.append(script);
          const frame = document.createElement("iframe");
          frame.src = "https://example.org/";
          document.body.append(frame);
        })"""
    )
    assert stopped == ["frame-src", "script-src-elem"]
    assert page.evaluate("window.hacked") is None


def test_colours_follow_the_scheme(page: Page) -> None:
    before = page.evaluate("document.getElementById('map').data[1].marker.color")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("(before) => document.getElementById('map').data[1].marker.color !== before", arg=before)


def test_other_spaces_are_drawn_and_fit(
    browser: Browser, watched: Watched, report: ReportData, make_reduced: MakeReduced, make_pair: Callable[..., SpacePair]
) -> None:
    evil = "</script><a href=x>look</a>"
    pairs = (make_pair(evil, names=["stranger", *(f"role_{number}" for number in range(11))]), make_pair("c", seed=2))
    page = watched.open(browser, replace(report, comparisons=pairs))
    drawn = page.evaluate("document.getElementById('compare-0').data[1]")
    assert len(drawn["x"]) == len(drawn["y"]) == 11
    assert page.locator("#compare-1 .textpoint").count() == 12
    assert f"model of {evil}, layer 2" in (page.text_content("#compare-0") or "")
    assert page.locator("#comparison a").count() == 0
    for size in (WIDE, NARROW):
        resize(page, size)
        page.wait_for_function("((host) => host.layout.width === host.clientWidth)(document.getElementById('compare-0'))")
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
