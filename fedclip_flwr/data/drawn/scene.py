"""One composed scene: a figure in some pose and colours, what is behind it, and what hides a bit of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedclip_flwr.data.drawn.canvas import COLOURS, Figure, Part, Rng, arc, place
from fedclip_flwr.data.drawn.figures import FIGURES

NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Scene:
    """What a style renders. The words are for captions; the data set itself uses the figure's name alone."""

    figure: str
    colour: str
    size: str  # "small", "big" or ""
    place: str
    behind: list[Part]
    body: list[Part]
    before: list[Part]


def _band(f: Figure, r: Rng, top: float, colour: str, bumps: float) -> None:
    """Ground from `top` down, its edge more or less hilly."""
    edge = [(-1.1 + i * 0.44, top + r.between(-bumps, bumps)) for i in range(6)]
    f.poly([*edge, (1.1, 1.1), (-1.1, 1.1)], colour)


def _hills(f: Figure, r: Rng) -> None:
    f.box(-1.1, -1.1, 1.1, 1.1, "sky")
    if r.chance(0.5):
        f.oval(r.between(-0.8, 0.8), r.between(-0.9, -0.5), 0.16, 0.16, "yellow")
    _band(f, r, r.between(-0.2, 0.2), "hill", 0.25)
    _band(f, r, r.between(0.35, 0.6), "grass", 0.08)


def _sea(f: Figure, r: Rng) -> None:
    f.box(-1.1, -1.1, 1.1, 1.1, "sky")
    f.box(-1.1, r.between(-0.1, 0.35), 1.1, 1.1, "sea")
    for _ in range(4):
        x, y = r.between(-0.9, 0.7), r.between(0.4, 0.95)
        f.line([(x, y), (x + 0.15, y - 0.04), (x + 0.3, y)], 0.03, "white", fine=True)


def _meadow(f: Figure, r: Rng) -> None:
    f.box(-1.1, -1.1, 1.1, 1.1, "sky")
    _band(f, r, r.between(-0.4, 0.3), "grass", 0.05)
    for _ in range(r.count(4, 9)):
        f.oval(r.between(-1, 1), r.between(0.4, 1), 0.05, 0.05, r.pick(NAMES), fine=True)


def _room(f: Figure, r: Rng) -> None:
    f.box(-1.1, -1.1, 1.1, 1.1, r.pick(["wall", "cream", r.pick(NAMES)]))
    f.box(-1.1, r.between(0.3, 0.6), 1.1, 1.1, r.pick(["floor", "wood", "stone"]))
    if r.chance(0.6):
        x, y = r.between(-0.8, 0.5), r.between(-0.9, -0.6)
        f.box(x, y, x + 0.5, y + 0.5, r.pick(["glass", r.pick(NAMES)]))


def _street(f: Figure, r: Rng) -> None:
    f.box(-1.1, -1.1, 1.1, 1.1, "sky")
    x = -1.1
    while x < 1.0:
        w, top = r.between(0.3, 0.6), r.between(-0.9, -0.1)
        f.box(x, top, x + w, 0.7, r.pick(["wall", "stone", r.pick(NAMES)]))
        for y in (top + 0.1, top + 0.4):
            f.box(x + 0.08, y, x + w - 0.1, y + 0.14, "glass", fine=True)
        x += w
    f.box(-1.1, r.between(0.45, 0.65), 1.1, 1.1, "stone")


def _forest(f: Figure, r: Rng) -> None:
    f.box(-1.1, -1.1, 1.1, 1.1, "hill")
    for _ in range(r.count(5, 8)):
        x = r.between(-1, 1)
        f.line([(x, -1.1), (x + r.near(0, 0.1), 0.7)], r.between(0.06, 0.16), "wood")
    _band(f, r, r.between(0.35, 0.6), r.pick(["leaf", "brown"]), 0.08)


def _snow(f: Figure, r: Rng) -> None:
    f.box(-1.1, -1.1, 1.1, 1.1, r.pick(["sky", "grey", "glass"]))
    _band(f, r, r.between(-0.1, 0.4), "snow", 0.12)
    for _ in range(14):
        f.oval(r.between(-1, 1), r.between(-1, 1), 0.03, 0.03, "white", fine=True)


def _sand(f: Figure, r: Rng) -> None:
    f.box(-1.1, -1.1, 1.1, 1.1, r.pick(["sky", "glass", "cream"]))
    _band(f, r, r.between(-0.2, 0.3), "sand", 0.15)
    _band(f, r, r.between(0.4, 0.7), "sand", 0.08)


def _clouds(f: Figure, r: Rng) -> None:
    f.box(-1.1, -1.1, 1.1, 1.1, r.pick(["sky", "blue", "glass"]))
    for _ in range(r.count(2, 4)):
        x, y, s = r.between(-1, 1), r.between(-0.9, 0.9), r.between(0.12, 0.22)
        for dx in (-1, 0, 1):
            f.oval(x + dx * s, y - (dx == 0) * s * 0.5, s, s * 0.75, "white")


def _plain(f: Figure, r: Rng) -> None:
    f.box(-1.1, -1.1, 1.1, 1.1, r.pick([*NAMES, "cream", "wall"]))


PLACES: dict[str, Callable[[Figure, Rng], None]] = {
    "in front of hills": _hills,
    "by the sea": _sea,
    "in a meadow": _meadow,
    "in a room": _room,
    "in a street": _street,
    "in a forest": _forest,
    "in the snow": _snow,
    "on sand": _sand,
    "among clouds": _clouds,
    "on a plain background": _plain,
}


def _clutter(f: Figure, r: Rng) -> None:
    """Shapes that mean nothing, so that neither does an edge or a patch of colour."""
    for _ in range(r.count(0, 4)):
        x, y, s, colour = r.between(-1, 1), r.between(-1, 1), r.between(0.1, 0.28), r.pick(NAMES)
        kind = r.count(0, 2)
        if kind == 0:
            f.oval(x, y, s, s * r.between(0.5, 1), colour, turn=r.between(0, 180))
        elif kind == 1:
            f.poly(arc(x, y, s, s, r.between(0, 90), 360 + r.between(0, 60))[::4], colour)
        else:
            f.line([(x - s, y), (x + s, y + r.near(0, 0.5))], r.between(0.05, 0.12), colour)


def _cover(f: Figure, r: Rng) -> None:
    """Something near the viewer that hides a part of the figure."""
    kind, side = r.count(0, 4), r.pick([-1, 1])
    if kind == 0:  # a bush
        x = side * r.between(0.2, 0.8)
        for dx in (-0.22, 0.22, 0):
            f.oval(x + dx, 0.92, 0.28, 0.3 + (dx == 0) * 0.12, "leaf")
    elif kind == 1:  # a post
        x = side * r.between(0.15, 0.8)
        f.box(x - 0.07, -1.1, x + 0.07, 1.1, r.pick(["wood", "steel", r.pick(NAMES)]))
    elif kind == 2:  # blades of grass
        for _ in range(7):
            x = r.between(-1, 1)
            f.poly([(x - 0.07, 1.1), (x + r.near(0, 0.15), r.between(0.25, 0.7)), (x + 0.07, 1.1)], "leaf")
    elif kind == 3:  # a twig
        y = r.between(-0.5, 0.5)
        f.line([(side * 1.1, y - 0.15), (side * 0.1, y)], 0.06, "wood")
        for x in (0.3, 0.55, 0.8):
            f.oval(side * x, y - 0.05, 0.16, 0.08, r.pick(["leaf", "pink"]), turn=r.between(-60, 60))
    else:  # the corner of a board
        x, y = side * r.between(0.35, 0.6), r.between(0.3, 0.6)
        f.poly([(x, y), (side * 1.1, y - 0.1), (side * 1.1, 1.1), (x + side * 0.1, 1.1)], r.pick(NAMES))


def compose(figure: str, r: Rng) -> Scene:
    """A new scene with that figure."""
    colour, second = r.pick(NAMES), r.pick(NAMES)
    while second == colour:
        second = r.pick(NAMES)
    drawing, behind, before = Figure(colour, second), Figure(colour, second), Figure(colour, second)
    FIGURES[figure](drawing, r)
    scale = r.between(0.42, 0.86)
    slack = 1.08 - scale
    squeeze = r.between(0.8, 1.12) * r.pick([-1, 1])
    body = place(drawing.parts, r.near(0, slack), r.near(0, slack), scale, r.near(0, 24), squeeze)
    where = r.pick(tuple(PLACES))
    PLACES[where](behind, r)
    _clutter(behind, r)
    if r.chance(0.5):
        _cover(before, r)
    size = "small" if scale < 0.54 else "big" if scale > 0.74 else ""
    return Scene(figure, colour, size, where, behind.parts, body, before.parts)
