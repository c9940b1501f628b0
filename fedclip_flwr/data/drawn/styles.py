"""How a scene looks: as a photo, a painting, a cartoon or a pencil sketch. One function a domain.

A scene is drawn at twice the size and reduced. All arithmetic on pixels is Pillow's on bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from fedclip_flwr.data.drawn.canvas import RGB, Part, Rng
from fedclip_flwr.data.drawn.scene import Scene

SIZE = 64
WIDE = 2 * SIZE  # the canvas before it is reduced
Colour = tuple[int, int, int]


def _pixels(part: Part) -> list[tuple[float, float]]:
    return [((x + 1) * SIZE, (y + 1) * SIZE) for x, y in part.points]


def _stroke(part: Part) -> int:
    return max(1, round(part.width * SIZE))


def _tone(colour: Colour, factor: float, shift: Colour = (0, 0, 0)) -> Colour:
    """The colour made lighter or darker, and moved a little."""
    r, g, b = (max(0, min(255, int(c * factor) + s)) for c, s in zip(colour, shift, strict=True))
    return r, g, b


def _shift(r: Rng, most: int) -> Colour:
    return r.count(-most, most), r.count(-most, most), r.count(-most, most)


def _grain(r: Rng, cells: int, low: int, high: int) -> Image.Image:
    """A grey cloud of random spots, `cells` to a side, with values from `low` to `high`."""
    noise = Image.frombytes("L", (cells, cells), r.randbytes(cells * cells))
    noise = noise.point([low + (high - low) * v // 255 for v in range(256)])
    return noise if cells == SIZE else noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _times(picture: Image.Image, grey: Image.Image) -> Image.Image:
    return ImageChops.multiply(picture, Image.merge("RGB", (grey, grey, grey)))


def _paint(draw: ImageDraw.ImageDraw, part: Part, colour: int | Colour) -> None:
    """The part in one colour, flat."""
    if part.width:
        draw.line(_pixels(part), colour, _stroke(part), joint="curve")
    else:
        draw.polygon(_pixels(part), colour)


def _outline(draw: ImageDraw.ImageDraw, part: Part, fill: int | Colour, edge: int | Colour, width: int) -> None:
    """The part filled, with an edge around it."""
    points = _pixels(part)
    if part.width:
        inner = _stroke(part)
        draw.line(points, edge, inner + 2 * width, joint="curve")
        draw.line(points, fill, max(1, inner), joint="curve")
    else:
        draw.polygon(points, fill)
        draw.line([*points, points[0], points[1]], edge, width, joint="curve")


def _mask(parts: Iterable[Part]) -> Image.Image:
    """255 where the parts are, in the size of the finished picture."""
    mask = Image.new("L", (WIDE, WIDE))
    draw = ImageDraw.Draw(mask)
    for part in parts:
        _paint(draw, part, 255)
    return mask.reduce(2)


def photo(scene: Scene, r: Rng) -> Image.Image:
    """Light from a side, rounded bodies with texture and a shadow, a background out of focus, grain."""

    def lit(parts: list[Part], edge: float) -> Image.Image:
        picture = Image.new("RGB", (WIDE, WIDE))
        draw = ImageDraw.Draw(picture)
        for part in parts:
            colour = _tone(RGB[part.colour], r.between(0.72, 1.0), _shift(r, 14))
            if edge and not part.fine and not part.width:
                _outline(draw, part, colour, _tone(colour, edge), 2)
            else:
                _paint(draw, part, colour)
        return picture.reduce(2)

    ground = lit(scene.behind, 0).filter(ImageFilter.GaussianBlur(r.between(0.6, 1.8)))
    ground = _times(ground, _grain(r, r.pick([8, 16, 32]), 205, 255))

    body, mask = lit(scene.body, r.between(0.7, 0.85)), _mask(scene.body)
    round_off = mask.filter(ImageFilter.GaussianBlur(r.between(3, 5)))
    dx, dy = r.count(-2, 2), r.count(-3, -1)
    dark = r.between(0.3, 0.6)
    round_off = ImageChops.offset(round_off, dx, dy).point(
        [int(255 * (1 - dark * (1 - v / 255) * 1.6)) for v in range(256)]
    )
    body = _times(_times(body, round_off), _grain(r, r.pick([12, 24, 32]), r.count(170, 220), 255))

    shadow = ImageChops.offset(mask, -2 * dx, r.count(2, 4)).filter(ImageFilter.GaussianBlur(2))
    ground = _times(ground, shadow.point([255 - v * 5 // 12 for v in range(256)]))
    ground.paste(body, mask=mask)
    if scene.before:
        near = _times(lit(scene.before, 0.7), _grain(r, 16, 150, 255))
        ground.paste(near, mask=_mask(scene.before))

    corners = Image.frombytes("L", (2, 2), bytes(r.count(165, 255) for _ in range(4)))
    ground = _times(ground, corners.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    ground = ground.filter(ImageFilter.GaussianBlur(r.between(0.2, 0.7)))
    noise = Image.frombytes("RGB", (SIZE, SIZE), r.randbytes(SIZE * SIZE * 3)).point([v // 14 for v in range(256)] * 3)
    light = r.between(1.3, 1.85)
    cast = [light * r.between(0.93, 1.07) for _ in range(3)]
    curve = [min(255, int(v * gain)) for gain in cast for v in range(256)]
    return ImageChops.add(ground, noise, 1, -9).point(curve)


PALETTES: tuple[tuple[Colour, ...], ...] = (
    ((38, 48, 88), (82, 120, 160), (222, 178, 74), (244, 226, 168), (150, 84, 54)),
    ((98, 30, 38), (200, 84, 46), (240, 178, 84), (250, 228, 184), (72, 84, 72)),
    ((40, 70, 62), (104, 146, 98), (204, 206, 130), (240, 232, 204), (172, 96, 96)),
    ((62, 38, 82), (142, 92, 158), (222, 142, 160), (250, 218, 196), (84, 146, 160)),
    ((50, 42, 36), (126, 94, 64), (190, 152, 102), (232, 214, 176), (94, 104, 92)),
    ((24, 62, 98), (46, 142, 158), (236, 120, 86), (252, 218, 140), (240, 240, 228)),
)


def art(scene: Scene, r: Rng) -> Image.Image:
    """Oil on canvas: the scene's colours pulled towards a palette, laid down in short strokes that follow a swirl."""
    palette = r.pick(PALETTES)
    pull = r.between(0.35, 0.65)

    def mixed(colour: Colour) -> Colour:
        near = min(palette, key=lambda p: sum((a - b) ** 2 for a, b in zip(p, colour, strict=True)))
        red, green, blue = (int(a + (b - a) * pull) for a, b in zip(colour, near, strict=True))
        return red, green, blue

    paints = {part.colour: mixed(RGB[part.colour]) for part in [*scene.behind, *scene.body, *scene.before]}

    base = Image.new("RGB", (WIDE, WIDE))
    draw = ImageDraw.Draw(base)
    for part in scene.behind:
        _paint(draw, part, paints[part.colour])
    for part in [*scene.body, *scene.before]:
        colour = paints[part.colour]
        if part.fine or part.width:
            _paint(draw, part, colour)
        else:
            _outline(draw, part, colour, _tone(colour, 0.72), 2)

    canvas = base.copy()
    draw, seen = ImageDraw.Draw(canvas), base.load()
    assert seen is not None
    swirl, lean = r.between(-0.06, 0.06), r.between(0, math.pi)
    body = _mask([*scene.body, *scene.before]).load()
    assert body is not None
    for count, length, width in ((90, 10, 8), (280, 4, 4)):
        for _ in range(count):
            x, y = r.random() * WIDE, r.random() * WIDE
            if width < 6 and not body[int(x / 2), int(y / 2)] and r.random() < 0.6:
                continue
            angle = lean + swirl * (x + y * 0.5) / 4
            u, v = length * math.cos(angle), length * math.sin(angle)
            red, green, blue = seen[int(x), int(y)]  # type: ignore[misc]
            d = r.count(-18, 18)
            draw.line((int(x - u), int(y - v), int(x + u), int(y + v)), (red + d, green + d, blue + d), width)
    picture = Image.blend(canvas, base, r.between(0.35, 0.6)).reduce(2)
    return _times(picture, _grain(r, SIZE, 232, 255))


def cartoon(scene: Scene, r: Rng) -> Image.Image:
    """Flat bright colours within firm outlines."""
    ink = r.pick([(24, 20, 28), (20, 24, 60), (60, 30, 20)])
    width = r.count(3, 5)
    glow = r.between(1.05, 1.25)
    picture = Image.new("RGB", (WIDE, WIDE))
    draw = ImageDraw.Draw(picture)
    quiet = r.between(0.35, 0.7)  # the background is paler, so that the figure stands out
    for part in scene.behind:
        red, green, blue = (int(c + (255 - c) * quiet) for c in RGB[part.colour])
        _paint(draw, part, (red, green, blue))
    for part in [*scene.body, *scene.before]:
        red, green, blue = RGB[part.colour]
        grey = (red + green + blue) // 3
        vivid = _tone((0, 0, 0), 1, tuple(int((grey + (c - grey) * 1.35) * glow) for c in (red, green, blue)))  # type: ignore[arg-type]
        if part.fine:
            _outline(draw, part, vivid, ink, 1) if not part.width else _paint(draw, part, vivid)
        else:
            _outline(draw, part, vivid, ink, width)
    return picture.reduce(2)


def sketch(scene: Scene, r: Rng) -> Image.Image:
    """A pencil on paper: wavering lines, some hatching, smudges; no colour."""
    paper, lead = r.count(238, 255), r.count(30, 95)
    picture = Image.new("L", (WIDE, WIDE), paper)
    draw = ImageDraw.Draw(picture)

    def waver(points: list[tuple[float, float]], much: float) -> list[tuple[float, float]]:
        return [(x + r.near(0, much), y + r.near(0, much)) for x, y in points]

    def pencil(part: Part, grey: int, width: int) -> None:
        points = _pixels(part)
        if part.width:
            stroke = _stroke(part)
            if stroke <= 6 or part.fine:
                draw.line(waver(points, 0.8), grey, width, joint="curve")
            else:
                draw.line(points, grey, stroke + width, joint="curve")
                draw.line(points, paper, stroke - width, joint="curve")
            return
        draw.polygon(points, paper)
        dark = part.colour in ("dark", "wood", "brown", "purple", "blue")
        if not part.fine and r.chance(0.5 if dark else 0.2):
            shape = Image.new("L", (WIDE, WIDE))
            ImageDraw.Draw(shape).polygon(points, 255)
            hatch = Image.new("L", (WIDE, WIDE), paper)
            pen, step = ImageDraw.Draw(hatch), r.count(5, 9)
            slope = r.count(-60, 60)
            for x in range(-64, WIDE + 64, step):
                pen.line((x, 0, x + slope, WIDE), min(paper, grey + r.count(30, 70)), 1)
            picture.paste(hatch, mask=shape)
        closed = [*points, points[0]]
        draw.line(waver(closed, 0.9), grey, width)
        if r.chance(0.6):
            draw.line(waver(closed, 1.6), min(paper, grey + 40), max(1, width - 1))

    if r.chance(0.6):
        faint = (paper + lead) // 2 + r.count(0, 30)
        for part in scene.behind[1:]:
            pencil(part, faint, 1)
    width = r.count(2, 3)
    for part in [*scene.body, *scene.before]:
        pencil(part, lead + r.count(-15, 25), max(1, width - part.fine))
    small = picture.reduce(2)
    if r.chance(0.4):
        small = Image.blend(small, small.filter(ImageFilter.GaussianBlur(2)), 0.3)
    tint = tuple(255 - r.count(0, 14) for _ in range(3))
    small = ImageChops.multiply(small, _grain(r, SIZE, 236, 255))
    return Image.merge("RGB", [small.point([v * t // 255 for v in range(256)]) for t in tint])


DOMAINS: dict[str, Callable[[Scene, Rng], Image.Image]] = {
    "art": art,
    "cartoon": cartoon,
    "photo": photo,
    "sketch": sketch,
}
