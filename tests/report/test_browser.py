"""Pages as a reader sees them: in Debian's Chromium, without a screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

KEY = (
    "h1",
    ".sentence",
    ".tile .figure",
    ".tile .below",
    "h2",
    "h3",
    ".note",
    "td",
    "th",
    "summary",
    "svg text",
    ".aside",
)
PAGES = ("plain", "many", "failed", "features", "compared")

LOOKS = """names => {
  const out = [];
  for (const name of names) for (const element of document.querySelectorAll(name)) {
    const style = getComputedStyle(element);
    out.push([name, element.ownerSVGElement ? style.fill : style.color, element.textContent]);
  }
  return [getComputedStyle(document.body).backgroundColor, out];
}"""

CLIPPED = """() => {
  const out = [];
  for (const svg of document.querySelectorAll('svg')) {
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll('text')) {
      const own = text.getBoundingClientRect();
      if (own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1)
        out.push(svg.getAttribute('aria-label') + ': ' + text.textContent);
    }
  }
  return out;
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """For these tests only: while it runs, Playwright's event loop is this thread's."""
    from playwright.sync_api import sync_playwright

    from benchmarks.screenshots import browser as installed

    if not (path := installed()):
        pytest.skip("no chromium, chromium-browser or google-chrome is installed here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab(NamedTuple):
    """A page in a window, and all that went wrong while it was opened or that it asked for."""

    page: Page
    heard: list[str]


@pytest.fixture(scope="module")
def tabs(chromium: Browser, pages: dict[str, Path]) -> dict[str, Tab]:
    """Each page opened once: for another window it is made wider or narrower, for another scheme it gets that."""
    return {name: opened(chromium, pages[name]) for name in PAGES}


@pytest.fixture
def shown(tabs: dict[str, Tab]) -> Callable[..., Page]:
    def show(name: str, width: int = 1200, scheme: Any = "light", media: Any = "screen") -> Page:
        page = tabs[name].page
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(media=media, color_scheme=scheme)
        return page

    return show


def opened(chromium: Browser, path: Path) -> Tab:
    page = chromium.new_page()
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("requestfailed", lambda request: heard.append(request.url[:80]))
    page.on("request", lambda request: heard.append(request.url[:80]) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    return Tab(page, [text for text in heard if not text.startswith("data:")])


def channels(colour: str) -> tuple[float, ...]:
    return tuple(float(part) for part in colour.removeprefix("rgb(").rstrip(")").split(","))


def luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_without_an_error_and_asks_for_nothing(
    name: str, tabs: dict[str, Tab], shown: Callable[..., Page]
) -> None:
    assert tabs[name].heard == []
    tab = shown(name)
    assert tab.locator("svg").count() >= 4
    assert tab.locator("h1").is_visible()
    assert all(tab.locator("svg").nth(number).bounding_box()["height"] > 40 for number in range(4))  # type: ignore[index]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_in_both_schemes(name: str, scheme: str, shown: Callable[..., Page]) -> None:
    tab = shown(name, scheme=scheme)
    background, looks = tab.evaluate(LOOKS, list(KEY))
    assert (luminance(background) < 0.05) == (scheme == "dark")
    strong = tab.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--strong').trim()")
    on_cells = f"rgb({', '.join(str(int(strong[at : at + 2], 16)) for at in (1, 3, 5))})"
    faint = {(kind, text) for kind, colour, text in looks if colour != on_cells and contrast(colour, background) < 4.5}
    assert faint == set()
    assert len(looks) > 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_stand_out_from_the_cells_that_they_are_on(scheme: str) -> None:
    from fedclip_flwr.report.theme import DARK, LIGHT, STEPS

    def rgb(shade: str) -> str:
        return f"rgb({', '.join(str(int(shade[at : at + 2], 16)) for at in (1, 3, 5))})"

    theme = LIGHT if scheme == "light" else DARK
    for step in range(STEPS):
        role = "strong" if step >= STEPS - 2 else "ink"
        assert contrast(rgb(theme[role]), rgb(theme[f"more-{step}"])) >= 4.5


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [360, 760, 1200])
def test_a_page_is_never_wider_than_the_window(name: str, width: int, shown: Callable[..., Page]) -> None:
    assert shown(name, width).evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [360, 1200])
def test_no_label_of_a_plot_is_cut_off(name: str, width: int, shown: Callable[..., Page]) -> None:
    assert shown(name, width).evaluate(CLIPPED) == []


def test_labels_of_a_plot_are_not_tiny_on_a_phone(shown: Callable[..., Page]) -> None:
    heights = shown("plain", 360).evaluate(
        "[...document.querySelectorAll('.plot:not(.wide) svg text')].map(t => {"
        " const svg = t.ownerSVGElement; return parseFloat(getComputedStyle(t).fontSize)"
        " * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width })"
    )
    assert min(heights) > 8


def test_in_print_it_is_dark_on_light_whatever_the_scheme_is(shown: Callable[..., Page]) -> None:
    tab = shown("many", scheme="dark", media="print")
    assert luminance(tab.evaluate("getComputedStyle(document.querySelector('h1')).color")) < 0.05
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(tab.pdf(format="A4")) > 10_000


def test_plots_are_described_for_those_who_can_not_see_them(shown: Callable[..., Page]) -> None:
    tab = shown("plain")
    svgs = tab.locator("svg")
    for number in range(svgs.count()):
        assert svgs.nth(number).get_attribute("role") == "img"
        assert len(svgs.nth(number).get_attribute("aria-label") or "") > 20
    assert tab.locator("img:not([alt])").count() == 0
