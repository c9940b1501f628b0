"""Draws a contact sheet: `python -m fedclip_flwr.data.drawn SHEET.png [--seed 0] [--rows 2]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fedclip_flwr.base import UserError
from fedclip_flwr.data.drawn import CLASSES, SIZE, Drawn, picture

GAP, MARGIN = 4, 22


def sheet(seed: int, rows: int) -> Image.Image:
    """A column for each class, `rows` rows for each domain."""
    tile = SIZE + GAP
    wide, high = 3 * MARGIN + tile * len(CLASSES), MARGIN + (tile * rows + GAP) * len(Drawn.domains)
    page = Image.new("RGB", (wide, high), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column, figure in enumerate(CLASSES):
        pen.text((3 * MARGIN + column * tile + SIZE / 2, MARGIN / 2), figure, "black", font, anchor="mm")
    for number, domain in enumerate(Drawn.domains):
        top = MARGIN + number * (tile * rows + GAP)
        pen.text((3 * MARGIN - 8, top + tile * rows / 2), domain, "black", font, anchor="rm")
        for column, figure in enumerate(CLASSES):
            for row in range(rows):
                page.paste(picture(seed, domain, figure, row)[0], (3 * MARGIN + column * tile, top + row * tile))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="the PNG to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2, help="pictures of a class in a domain")
    given = parser.parse_args()
    try:
        page = sheet(Drawn(given.seed).seed, given.rows)
        page.save(given.path)
    except (UserError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    print(f"{given.path}: {page.width}×{page.height}, seed {given.seed}")


if __name__ == "__main__":
    main()
