"""The drawing board: repeatable randomness, colours, and parts that a figure is put together from.

A part is an outline with a colour's name; how it looks on paper is a style's business (`styles.py`).
Everything is decided with integers or short arithmetic, so that a seed gives the same picture on every machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Point = tuple[float, float]
T = TypeVar("T")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 52, 46),
    "orange": (238, 132, 38),
    "yellow": (244, 204, 62),
    "green": (74, 158, 76),
    "teal": (52, 162, 158),
    "blue": (58, 104, 196),
    "purple": (132, 80, 172),
    "pink": (238, 138, 170),
    "brown": (136, 90, 54),
    "grey": (142, 146, 152),
    "white": (240, 238, 230),
}
"""The colours that captions speak of; any figure may have any of them."""

FIXED: dict[str, tuple[int, int, int]] = {
    "dark": (46, 44, 50),
    "cream": (250, 236, 206),
    "skin": (232, 184, 148),
    "wood": (122, 84, 54),
    "leaf": (84, 150, 66),
    "glass": (168, 206, 226),
    "steel": (176, 182, 190),
    "sky": (158, 200, 232),
    "sea": (66, 124, 162),
    "grass": (122, 168, 84),
    "sand": (226, 202, 150),
    "wall": (214, 200, 180),
    "floor": (158, 122, 92),
    "stone": (134, 130, 126),
    "hill": (112, 146, 108),
    "snow": (234, 240, 246),
}
"""The colours of what goes without saying: tyres, windows, leaves, skies."""

RGB = COLOURS | FIXED


class Rng(random.Random):
    """Random numbers built on `random()` and `randbytes()` alone, whose sequences no Python version changes."""

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def count(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def near(self, centre: float, spread: float) -> float:
        """Close to `centre`: the mean of three draws, so the ends are rare."""
        return centre + spread * (self.random() + self.random() + self.random() - 1.5) / 1.5


@dataclass(frozen=True)
class Part:
    """An outline in a colour: a filled shape, or a line of some width."""

    points: tuple[Point, ...]
    colour: str
    width: float = 0.0  # 0 is a filled shape
    fine: bool = False  # small detail: styles give it a thinner outline, or none


class Figure:
    """Collects parts, back to front, in a box of about -1…1 with y pointing down."""

    def __init__(self, main: str, second: str) -> None:
        self.main = main
        self.second = second
        self.parts: list[Part] = []

    def poly(self, points: Sequence[Point], colour: str, *, fine: bool = False) -> None:
        self.parts.append(Part(tuple(points), colour, fine=fine))

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: str, *, fine: bool = False) -> None:
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, fine=fine)

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: str, *, turn: float = 0.0, fine: bool = False
    ) -> None:
        self.poly(arc(x, y, rx, ry, 0, 360, turn=turn), colour, fine=fine)

    def blob(self, points: Sequence[Point], colour: str, *, fine: bool = False) -> None:
        """A closed shape with a smooth outline through the points."""
        self.poly(smooth(points), colour, fine=fine)

    def line(self, points: Sequence[Point], width: float, colour: str, *, fine: bool = False) -> None:
        self.parts.append(Part(tuple(points), colour, width, fine))

    def eye(self, x: float, y: float, size: float = 0.07) -> None:
        self.oval(x, y, size, size, "white", fine=True)
        self.oval(x + size * 0.2, y, size * 0.55, size * 0.6, "dark", fine=True)


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, *, turn: float = 0.0) -> list[Point]:
    """Points on an ellipse from angle `start` to `end` (degrees, clockwise on the screen), tilted by `turn`."""
    steps = max(4, round(abs(end - start) / 22))
    ct, st = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    points = []
    for i in range(steps + (abs(end - start) < 360)):
        a = math.radians(start + (end - start) * i / steps)
        u, v = rx * math.cos(a), ry * math.sin(a)
        points.append((x + u * ct - v * st, y + u * st + v * ct))
    return points


def smooth(points: Sequence[Point], steps: int = 4) -> list[Point]:
    """A closed Catmull-Rom curve through the points."""
    n = len(points)
    out = []
    for i in range(n):
        (x0, y0), (x1, y1) = points[i - 1], points[i]
        (x2, y2), (x3, y3) = points[(i + 1) % n], points[(i + 2) % n]
        for k in range(steps):
            t = k / steps
            a, b = -t * (1 - t) ** 2 / 2, (2 - 5 * t * t + 3 * t**3) / 2
            c, d = (t + 4 * t * t - 3 * t**3) / 2, -t * t * (1 - t) / 2
            out.append((a * x0 + b * x1 + c * x2 + d * x3, a * y0 + b * y1 + c * y2 + d * y3))
    return out


def place(parts: Sequence[Part], x: float, y: float, scale: float, turn: float, squeeze: float) -> list[Part]:
    """The parts moved to (x, y), scaled, tilted by `turn` degrees, and made narrower (or mirrored) by `squeeze`."""
    ct, st = math.cos(math.radians(turn)) * scale, math.sin(math.radians(turn)) * scale

    def move(point: Point) -> Point:
        u, v = point[0] * squeeze, point[1]
        # sixteenths of a pixel of a 64-pixel picture: the last bits of a cosine can't change a picture
        return round((x + u * ct - v * st) * 512) / 512, round((y + u * st + v * ct) * 512) / 512

    return [Part(tuple(map(move, p.points)), p.colour, p.width * scale, p.fine) for p in parts]
