"""A picture set that needs no download: ten everyday things, drawn in four domains that really shift.

`picture` draws one; the same seed, domain, figure and index give the same picture on every machine.
"""

from __future__ import annotations

from PIL import Image

from fedclip_flwr.data.drawn.canvas import Rng
from fedclip_flwr.data.drawn.figures import CLASSES, FIGURES
from fedclip_flwr.data.drawn.scene import Scene, compose
from fedclip_flwr.data.drawn.styles import DOMAINS, SIZE

__all__ = ["CLASSES", "DOMAINS", "FIGURES", "SIZE", "Scene", "picture"]


def picture(seed: int, domain: str, figure: str, index: int) -> tuple[Image.Image, Scene]:
    """A 64×64 RGB picture, and the scene that it shows."""
    r = Rng(f"{seed}/{domain}/{figure}/{index}")
    scene = compose(figure, r)
    return DOMAINS[domain](scene, r), scene
