"""Screenshots of a report for the documentation: docs/report-wide.png, -narrow.png and -dark.png.

    fedclip run
    python -m benchmarks.screenshots ~/.fedclip/runs/latest/report.html

They are made in Debian's Chromium and show the page from its top down to several plots.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent.parent / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class View(NamedTuple):
    """What a reader sees: the window's size in CSS pixels, the scheme, and how far down the picture goes."""

    width: int
    scheme: Literal["light", "dark"] = "light"
    height: int = 1500


VIEWS = {"wide": View(1080), "narrow": View(390, height=1900), "dark": View(1080, "dark")}


def browser() -> str | None:
    """The browser that is installed here."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def shoot(page: Path, view: View, to: Path) -> None:
    """Writes what the reader sees as a PNG, in few colours so that it is small."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        tab = chromium.new_page(
            viewport={"width": view.width, "height": view.height},
            color_scheme=view.scheme,
        )
        tab.goto(page.absolute().as_uri())
        shot = tab.screenshot()
        chromium.close()
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    image.quantize(192, dither=Image.Dither.NONE).save(to, optimize=True)


def main() -> None:
    page = Path(sys.argv[1]).expanduser()
    for name, view in VIEWS.items():
        to = DOCS / f"report-{name}.png"
        shoot(page, view, to)
        print(f"{to}: {to.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
