"""A picture set that needs no download: ten everyday things, drawn in four domains that really shift.

The same seed, domain, figure and index give the same picture on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from fedclip_flwr.base import UserError, content
from fedclip_flwr.data.base import Picture
from fedclip_flwr.data.drawn.canvas import Rng
from fedclip_flwr.data.drawn.figures import CLASSES, FIGURES
from fedclip_flwr.data.drawn.scene import Scene, compose
from fedclip_flwr.data.drawn.styles import DOMAINS, SIZE

__all__ = ["CLASSES", "DOMAINS", "FIGURES", "SEEDS", "SIZE", "Drawn", "Scene", "picture"]

PER_CLASS = 150
SEEDS = 1_000_000
"""Data sets have seeds below this; the bundled CLIP learnt from pictures with a seed above."""


def picture(seed: int, domain: str, figure: str, index: int) -> tuple[Image.Image, Scene]:
    """A 64×64 RGB picture, and the scene that it shows."""
    r = Rng(f"{seed}/{domain}/{figure}/{index}")
    scene = compose(figure, r)
    return DOMAINS[domain](scene, r), scene


class Drawn:
    """The picture set as a source: 150 pictures of each class in each domain, classes in turn."""

    class_names = CLASSES
    domains = tuple(sorted(DOMAINS))

    def __init__(self, seed: int = 0) -> None:
        if not 0 <= seed < SEEDS:
            raise UserError(f"data = 'drawn:{seed}': expected a seed from 0 to {SEEDS - 1:,}")
        self.seed = seed

    def content(self, domain: str) -> str:
        """Of what the pictures are made by: the drawing code, Pillow's version, the seed."""
        here = Path(__file__).parent
        code = content.of_files(here, sorted(f.name for f in here.glob("*.py")), content.memory())
        return content.digest(code, version("pillow"), str(self.seed), domain)

    def count(self, domain: str) -> int:
        return PER_CLASS * len(CLASSES)

    def pictures(self, domain: str, start: int = 0, stop: int | None = None) -> Iterator[Picture]:
        for row in range(self.count(domain))[start:stop]:
            index, label = divmod(row, len(CLASSES))
            yield Picture(f"{CLASSES[label]} {index}", label, picture(self.seed, domain, CLASSES[label], index)[0])
