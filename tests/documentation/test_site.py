"""The documentation as a site: it is built without a warning, whole, and leads nowhere that is not there."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tests.documentation.pages import PAGES, ROOT

pytestmark = pytest.mark.documentation


class Links(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.to: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.places |= {attributes[name] for name in ("id", "name") if name in attributes}
        if tag == "a" and "href" in attributes:
            self.to.append(attributes["href"])
        if tag in ("img", "script", "iframe", "source") and "src" in attributes:
            self.loaded.append(attributes["src"])
        if tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(attributes["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it, its notebook run."""
    place = tmp_path_factory.mktemp("site")
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "sphinx-build" in line)
    words = line.split()[1:]
    assert words[-2:] == ["docs", "build/docs"]
    command = [sys.executable, "-m", "sphinx", *words[:-1], str(place / "html"), "-d", str(place / "made")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": WARNING: " not in done.stderr  # as Sphinx writes them; the notebook's kernel has words of its own
    return place / "html"


def test_every_page_is_in_the_site_and_found_from_its_front(site: Path) -> None:
    front = Links(site / "index.html")
    reached = {urldefrag(link).url for link in front.to}
    pages = {f"{path.stem}.html" for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")}
    assert pages - {"index.html"} <= reached
    assert all((site / page).exists() for page in pages)
    assert (site / "searchindex.js").exists()


def test_no_link_leads_nowhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: Links(path) for path in site.rglob("*.html")}
    wrong = []
    for path, links in pages.items():
        for link in {*links.to, *links.loaded}:
            if re.match(r"(https?|mailto):", link):
                if link in links.loaded:
                    wrong.append(f"{path.name} loads {link}")
                continue
            where, place = urldefrag(link)
            file = (path.parent / unquote(where.partition("?")[0])) if where else path
            if not file.exists():
                wrong.append(f"{path.name}: {link}")
            elif place and file.resolve() in pages and unquote(place) not in pages[file.resolve()].places:
                wrong.append(f"{path.name}: no such place: {link}")
    assert not wrong


def test_the_notebook_was_run_to_its_end(site: Path) -> None:
    text = (site / "notebook.html").read_text()
    plain = re.sub(r"<[^>]+>", "", text)
    assert "times fewer bytes than the whole model" in plain
    assert text.count("_images/") >= 5
    assert "Traceback" not in plain


def anchor(heading: str) -> str:
    """The place that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_where_the_pages_are_read_as_files_too(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        where, place = urldefrag(link)
        file = (path.parent / where).resolve() if where else path
        assert file.exists(), link
        if place:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert place in map(anchor, headings), link
