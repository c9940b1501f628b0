"""What can be drawn: one function a class. Each puts a figure together from parts, never twice the same.

`CLASSES` are the ten of the data set; the bundled CLIP learnt all of `FIGURES`.
"""

from __future__ import annotations

from collections.abc import Callable

from fedclip_flwr.data.drawn.canvas import Figure, Rng, arc

# fmt: off
# (an outline reads better as a run of points than with each on a line of its own)


def bird(f: Figure, r: Rng) -> None:
    tail = r.between(0.75, 1.0)
    f.line([(-0.05, 0.4), (-0.1, 0.85), (0.1, 0.87)], 0.06, "orange")
    f.line([(0.2, 0.4), (0.2, 0.85), (0.4, 0.87)], 0.06, "orange")
    f.poly([(-0.4, 0.05), (-tail, r.between(-0.25, 0.05)), (-tail - 0.02, 0.25), (-0.4, 0.35)], f.second)
    f.blob([(0.55, -0.55), (0.72, -0.2), (0.5, 0.3), (0.05, 0.52), (-0.42, 0.32), (-0.5, 0.05), (0.05, -0.2),
            (0.2, -0.55)], f.main)
    f.poly([(0.62, -0.5), (1.0, r.between(-0.42, -0.3)), (0.65, -0.22)], "orange")
    if r.chance(0.35):
        f.blob([(0.15, -0.1), (-0.1, -0.85), (-0.5, -0.8), (-0.4, -0.1), (-0.1, 0.15)], f.second)
    else:
        f.blob([(0.25, -0.05), (0.15, 0.28), (-0.4, 0.3), (-0.6, 0.15), (-0.2, -0.1)], f.second)
    f.eye(0.48, -0.42, 0.08)


def boat(f: Figure, r: Rng) -> None:
    bow = r.between(0.85, 1.0)
    f.box(-0.04, -0.95, 0.04, 0.4, "wood")
    sail = r.between(0.6, 0.8)
    f.poly([(0.09, -0.9), (0.09, 0.25), (sail, 0.25)], f.second)
    if r.chance(0.75):
        f.poly([(-0.09, r.between(-0.8, -0.6)), (-0.09, 0.25), (-0.6, 0.25)], r.pick(["white", "cream", f.second]))
    if r.chance(0.5):
        f.poly([(0.0, -1.0), (-0.3, -0.92), (0.0, -0.82)], "red", fine=True)
    f.poly([(-bow, 0.38), (bow, 0.38), (r.between(0.5, 0.7), 0.82), (-r.between(0.5, 0.65), 0.82)], f.main)
    f.line([(-bow + 0.1, 0.5), (bow - 0.12, 0.5)], 0.05, "cream", fine=True)


def car(f: Figure, r: Rng) -> None:
    roof, back, front = r.between(-0.55, -0.4), r.between(-0.6, -0.45), r.between(0.3, 0.45)
    f.poly([(back - 0.15, 0.0), (back + 0.05, roof), (front - 0.1, roof), (front + 0.22, 0.0)], f.main)
    f.poly([(back - 0.02, -0.02), (back + 0.12, roof + 0.1), (-0.1, roof + 0.1), (-0.1, -0.02)], "glass", fine=True)
    f.poly([(0.0, -0.02), (0.0, roof + 0.1), (front - 0.15, roof + 0.1), (front + 0.08, -0.02)], "glass", fine=True)
    f.blob([(-0.95, 0.05), (-0.4, -0.04), (0.5, -0.04), (0.92, 0.08), (0.98, 0.35), (0.6, 0.42), (-0.6, 0.42),
            (-0.98, 0.35)], f.main)
    size = r.between(0.2, 0.26)
    for x in (-0.55, 0.55):
        f.oval(x, 0.42, size, size, "dark")
        f.oval(x, 0.42, size * 0.5, size * 0.5, "steel", fine=True)
    f.oval(0.88, 0.15, 0.07, 0.08, "yellow", fine=True)
    f.line([(-0.05, 0.02), (-0.05, 0.35)], 0.03, "dark", fine=True)


def cat(f: Figure, r: Rng) -> None:
    side = r.pick([-1, 1])
    up = r.between(-0.3, 0.3)
    f.line([(side * 0.35, 0.75), (side * 0.8, 0.7), (side * 0.88, up + 0.2), (side * 0.72, up)], 0.15, f.main)
    f.blob([(-0.25, -0.1), (0.25, -0.1), (0.48, 0.5), (0.42, 0.9), (-0.42, 0.9), (-0.48, 0.5)], f.main)
    f.blob([(-0.13, 0.15), (0.13, 0.15), (0.2, 0.6), (-0.2, 0.6)], r.pick(["cream", f.main]), fine=True)
    f.oval(-0.2, 0.87, 0.17, 0.1, f.main)
    f.oval(0.2, 0.87, 0.17, 0.1, f.main)
    for s in (-1, 1):
        f.poly([(s * 0.08, -0.62), (s * 0.42, -1.0), (s * 0.48, -0.4)], f.main)
        f.poly([(s * 0.2, -0.68), (s * 0.38, -0.86), (s * 0.4, -0.52)], "pink", fine=True)
    f.oval(0, -0.4, 0.48, 0.38, f.main)
    for s in (-1, 1):
        f.oval(s * 0.2, -0.46, 0.08, 0.11, r.pick(["yellow", "green"]), fine=True)
        f.oval(s * 0.2, -0.46, 0.03, 0.1, "dark", fine=True)
        for dy in (-0.05, 0.05):
            f.line([(s * 0.18, -0.25), (s * 0.68, -0.25 + dy * 2)], 0.025, "dark", fine=True)
    f.poly([(-0.06, -0.32), (0.06, -0.32), (0, -0.24)], "pink", fine=True)


def chair(f: Figure, r: Rng) -> None:
    lean, seat, leg = r.between(0.0, 0.15), r.between(0.0, 0.15), r.between(0.09, 0.14)
    left, right = -0.45, r.between(0.35, 0.5)
    wood = r.pick(["wood", f.main, "steel"])
    f.line([(left + 0.2, seat), (left + 0.2, 0.72)], leg, wood)
    f.line([(right + 0.12, seat), (right + 0.15, 0.72)], leg, wood)
    style = r.count(0, 2)
    top = r.between(-0.95, -0.8)
    if style == 0:
        f.poly([(left - lean, top), (left - lean + 0.18, top - 0.03), (left + 0.18, seat), (left, seat)], f.main)
    elif style == 1:
        f.poly([(left - lean, top), (right - 0.05, top - 0.05), (right, seat), (left, seat)], f.main)
    else:
        for x in (0.0, 0.42, 0.85):
            w = right - left - 0.05
            f.line([(left + w * x - lean / 2, top), (left + w * x, seat)], 0.1, f.main)
        f.line([(left - lean, top + 0.06), (right - 0.05, top + 0.02)], 0.18, f.main)
    f.poly([(left - 0.05, seat), (right, seat), (right + 0.2, seat + 0.2),
            (left + 0.08, seat + 0.2)], f.second if r.chance(0.5) else f.main)
    f.line([(left + 0.1, seat + 0.2), (left + 0.06, 0.95)], leg, wood)
    f.line([(right + 0.14, seat + 0.2), (right + 0.18, 0.95)], leg, wood)


def cup(f: Figure, r: Rng) -> None:
    top, bottom, low = r.between(0.5, 0.62), r.between(0.32, 0.55), r.between(0.5, 0.8)
    f.line(arc(top - 0.02, 0.05, r.between(0.28, 0.38), 0.3, -95, 95), 0.12, f.main)
    f.poly([(-top, -0.4), *arc(0, low, bottom, 0.12, 180, 0), (top, -0.4)], f.main)
    f.oval(0, -0.4, top, 0.17, f.main)
    f.oval(0, -0.38, top * 0.85, 0.12, r.pick(["brown", "dark", "cream"]), fine=True)
    pattern = r.count(0, 3)
    if pattern == 1:
        f.line([(-top * 0.92, 0.1), (0, 0.2), (top * 0.92, 0.1)], 0.14, f.second, fine=True)
    elif pattern == 2:
        f.oval(0, 0.2, 0.2, 0.2, f.second, fine=True)
    if r.chance(0.45):
        for x in (-0.2, 0.15):
            f.line([(x, -0.62), (x + 0.1, -0.72), (x, -0.84), (x + 0.08, -0.95)], 0.04, "white", fine=True)
    if r.chance(0.3):
        f.oval(0, low + 0.1, 0.8, 0.12, f.second)


def fish(f: Figure, r: Rng) -> None:
    high, nose = r.between(0.36, 0.55), r.between(0.75, 0.88)
    fork = r.between(-0.85, -0.75)
    f.poly([(-0.5, 0), (-1.0, -0.42), (fork, 0), (-1.0, 0.42)], f.second)
    f.blob([(-0.25, -high + 0.1), (0.0, -high - 0.25), (0.3, -high + 0.02), (0.1, -0.1)], f.second)
    f.poly([(0.0, high - 0.1), (-0.2, high + 0.22), (0.25, high - 0.12)], f.second)
    f.blob([(-0.62, 0), (-0.2, -high * 0.85), (0.3, -high), (nose, -0.08), (nose, 0.08), (0.3, high),
            (-0.2, high * 0.85)], f.main)
    if r.chance(0.5):
        for x in (-0.25, 0.0, 0.2):
            h = high * 0.7
            f.line([(x, -h), (x - 0.06, 0), (x, h)], 0.07, f.second, fine=True)
    f.line(arc(0.3, 0, 0.12, high * 0.75, -70, 70), 0.035, "dark", fine=True)
    f.poly([(0.2, 0.05), (-0.08, 0.28), (0.25, 0.25)], f.second, fine=True)
    f.eye(0.58, -0.12, 0.09)


def flower(f: Figure, r: Rng) -> None:
    bend, head = r.between(-0.15, 0.15), r.between(-0.45, -0.3)
    f.line([(0, head), (bend, 0.3), (0, 0.98)], 0.08, "leaf")
    for s in (-1, 1):
        if r.chance(0.85):
            y = r.between(0.45, 0.75)
            f.blob([(0, y + 0.15), (s * 0.3, y - 0.12), (s * 0.62, y - 0.22), (s * 0.4, y + 0.1)], "leaf")
    petals, turn = r.count(5, 9), r.between(0, 72)
    long = r.between(0.26, 0.32)
    wide = 1.15 / petals
    for i in range(petals):
        (x, y), *_ = arc(0, head, 0.36, 0.36, turn + i * 360 / petals, turn + i * 360 / petals + 1)
        f.oval(x, y, long, wide, f.main, turn=turn + i * 360 / petals)
    f.oval(0, head, 0.2, 0.2, r.pick(["yellow", "brown", f.second]))


def house(f: Figure, r: Rng) -> None:
    wide, wall, peak = r.between(0.6, 0.8), r.between(-0.2, 0.0), r.between(-0.95, -0.7)
    if r.chance(0.7):
        x = r.pick([-1, 1]) * wide * 0.55
        f.box(x - 0.1, peak + 0.05, x + 0.1, wall, r.pick(["stone", "brown", f.second]))
    f.box(-wide, wall, wide, 0.85, f.main)
    eave = wide + 0.15
    if r.chance(0.65):
        f.poly([(-eave, wall), (r.between(-0.1, 0.1), peak), (eave, wall)], f.second)
    else:
        f.poly([(-eave, wall), (-wide * 0.55, peak + 0.2), (wide * 0.55, peak + 0.2), (eave, wall)], f.second)
    door = r.pick([-0.45, 0.0, 0.45]) * wide
    f.box(door - 0.14, 0.3, door + 0.14, 0.85, r.pick(["wood", f.second, "dark"]))
    for x in (-0.55, 0.0, 0.55):
        if abs(x * wide - door) > 0.2:
            f.box(x * wide - 0.14, 0.12, x * wide + 0.14, 0.42, "glass", fine=True)
            f.line([(x * wide, 0.12), (x * wide, 0.42)], 0.03, "dark", fine=True)


def tree(f: Figure, r: Rng) -> None:
    kind = r.count(0, 2)
    width = r.between(0.09, 0.15)
    f.poly([(-width * 1.5, 0.95), (-width, 0.0), (width, 0.0), (width * 1.5, 0.95)], "wood")
    if kind == 0:  # a fir
        wide = r.between(0.55, 0.75)
        for i, y in enumerate((0.55, 0.12, -0.3)):
            w = wide * (1 - i * 0.24)
            f.poly([(-w, y), (0, y - 0.66), (w, y)], f.main)
    elif kind == 1:  # a round crown
        lobes = r.count(7, 9)
        points = []
        for i in range(lobes):
            for radius, angle in ((r.between(0.6, 0.72), i), (r.between(0.5, 0.56), i + 0.5)):
                points += arc(0, -0.35, radius, radius * 0.92, angle * 360 / lobes, 360)[:1]
        f.blob(points, f.main)
    else:  # several heaps of leaves
        for x, y in ((-0.42, -0.1), (0.42, -0.12), (0.0, -0.05), (-0.25, -0.5), (0.25, -0.52), (0.0, -0.65)):
            s = r.between(0.3, 0.4)
            f.oval(x + r.near(0, 0.06), y, s, s * 0.9, f.main)
    if kind and r.chance(0.3):
        for _ in range(6):
            f.oval(r.between(-0.4, 0.4), r.between(-0.7, -0.1), 0.07, 0.07, f.second, fine=True)


def apple(f: Figure, r: Rng) -> None:
    f.blob([(0, -0.45), (0.4, -0.6), (0.78, -0.15), (0.55, 0.6), (0.15, 0.8), (0, 0.72), (-0.15, 0.8), (-0.55, 0.6),
            (-0.78, -0.15), (-0.4, -0.6)], f.main)
    f.line([(0, -0.42), (0.05, -0.7), (0.14, -0.9)], 0.07, "wood")
    if r.chance(0.8):
        f.blob([(0.1, -0.72), (0.35, -0.98), (0.62, -0.9), (0.4, -0.68)], "leaf")


def ball(f: Figure, r: Rng) -> None:
    f.oval(0, 0, 0.8, 0.8, f.main)
    if r.chance(0.5):
        f.poly(arc(0, 0, 0.3, 0.8, 0, 360), f.second, fine=True)
    else:
        f.line([(-0.8, 0), (0, r.between(0.1, 0.3)), (0.8, 0)], 0.2, f.second, fine=True)
    f.oval(0, 0, 0.12, 0.12, "white", fine=True)


def balloon(f: Figure, r: Rng) -> None:
    f.line([(-0.3, 0.2), (-0.16, 0.68)], 0.03, "dark", fine=True)
    f.line([(0.3, 0.2), (0.16, 0.68)], 0.03, "dark", fine=True)
    f.blob([(0, -0.98), (0.6, -0.75), (0.68, -0.25), (0.25, 0.4), (-0.25, 0.4), (-0.68, -0.25), (-0.6, -0.75)], f.main)
    f.blob([(0, -0.98), (0.22, -0.7), (0.25, -0.2), (0.1, 0.4), (-0.1, 0.4), (-0.25, -0.2),
            (-0.22, -0.7)], f.second, fine=True)
    f.box(-0.2, 0.65, 0.2, r.between(0.88, 0.98), "wood")


def book(f: Figure, r: Rng) -> None:
    tilt = r.between(0.05, 0.2)
    f.poly([(-0.95, -0.45 - tilt), (0, -0.4), (0.95, -0.45 - tilt), (0.95, 0.55 - tilt), (0, 0.65),
            (-0.95, 0.55 - tilt)], f.main)
    for s in (-1, 1):
        f.poly([(0, -0.45), (s * 0.85, -0.55 - tilt), (s * 0.85, 0.4 - tilt), (0, 0.55)], "cream")
        for y in (-0.25, -0.02, 0.2):
            f.line([(s * 0.12, y - 0.02), (s * 0.7, y - tilt)], 0.04, "grey", fine=True)


def bottle(f: Figure, r: Rng) -> None:
    w, shoulder = r.between(0.26, 0.36), r.between(-0.35, -0.15)
    f.poly([(-w, shoulder), (-0.11, shoulder - 0.25), (-0.11, -0.85), (0.11, -0.85), (0.11, shoulder - 0.25),
            (w, shoulder), (w, 0.95), (-w, 0.95)], f.main)
    f.box(-0.14, -0.98, 0.14, -0.82, f.second)
    f.box(-w, 0.1, w, 0.6, r.pick(["cream", f.second]), fine=True)


def bus(f: Figure, r: Rng) -> None:
    f.box(-0.98, -0.5, 0.98, 0.45, f.main)
    n = r.count(3, 5)
    for i in range(n):
        x = -0.85 + i * 1.35 / n
        f.box(x, -0.35, x + 1.1 / n, 0.0, "glass", fine=True)
    f.box(0.62, -0.35, 0.88, 0.4, "glass", fine=True)
    f.line([(-0.98, 0.16), (0.55, 0.16)], 0.08, f.second, fine=True)
    for x in (-0.55, 0.45):
        f.oval(x, 0.47, 0.2, 0.2, "dark")
        f.oval(x, 0.47, 0.09, 0.09, "steel", fine=True)


def butterfly(f: Figure, r: Rng) -> None:
    high = r.between(-0.85, -0.6)
    for s in (-1, 1):
        f.blob([(0, 0), (s * 0.35, high), (s * 0.85, high), (s * 0.9, -0.25), (s * 0.4, 0.1)], f.main)
        f.blob([(0, 0.05), (s * 0.55, 0.12), (s * 0.72, 0.5), (s * 0.4, 0.8), (s * 0.1, 0.4)], f.second)
        f.oval(s * 0.6, -0.45, 0.13, 0.13, f.second, fine=True)
        f.line([(0, -0.4), (s * 0.2, -0.85)], 0.04, "dark", fine=True)
    f.oval(0, 0.05, 0.08, 0.5, "dark")


def cactus(f: Figure, r: Rng) -> None:
    green = r.pick(["leaf", "green", f.main])
    f.line([(0, 0.5), (0, -0.7)], 0.36, green)
    f.oval(0, -0.7, 0.18, 0.18, green)
    for s in (-1, 1):
        y = r.between(-0.1, 0.25)
        f.line([(s * 0.1, y), (s * 0.5, y), (s * 0.5, y - 0.4)], 0.2, green)
    f.poly([(-0.4, 0.45), (0.4, 0.45), (0.3, 0.95), (-0.3, 0.95)], f.main)
    f.box(-0.45, 0.4, 0.45, 0.55, f.main)
    if r.chance(0.5):
        f.oval(0, -0.9, 0.12, 0.1, "pink", fine=True)


def castle(f: Figure, r: Rng) -> None:
    for s in (-1, 1):
        top = r.between(-0.5, -0.35)
        f.box(s * 0.65 - 0.24, top, s * 0.65 + 0.24, 0.85, f.main)
        f.poly([(s * 0.65 - 0.3, top), (s * 0.65, top - 0.5), (s * 0.65 + 0.3, top)], f.second)
        f.box(s * 0.65 - 0.06, top + 0.2, s * 0.65 + 0.06, top + 0.45, "dark", fine=True)
    f.box(-0.5, 0.0, 0.5, 0.85, f.main)
    for x in (-0.42, -0.12, 0.18):
        f.box(x, -0.16, x + 0.2, 0.04, f.main)
    f.poly([(-0.18, 0.85), *arc(0, 0.45, 0.18, 0.2, 180, 360), (0.18, 0.85)], "wood")


def clock(f: Figure, r: Rng) -> None:
    if r.chance(0.5):
        for s in (-1, 1):
            f.oval(s * 0.5, -0.72, 0.2, 0.15, "steel", turn=s * 35)
            f.line([(s * 0.45, 0.6), (s * 0.62, 0.92)], 0.1, "dark")
    f.oval(0, 0, 0.82, 0.82, f.main)
    f.oval(0, 0, 0.64, 0.64, "white")
    for i in range(12):
        (x, y), *_ = arc(0, 0, 0.52, 0.52, i * 30, i * 30 + 1)
        f.oval(x, y, 0.04, 0.04, "dark", fine=True)
    for length, width in ((0.3, 0.08), (0.46, 0.05)):
        (x, y), *_ = arc(0, 0, length, length, r.between(0, 360), 400)
        f.line([(0, 0), (x, y)], width, "dark", fine=True)


def dog(f: Figure, r: Rng) -> None:
    tail = r.between(-0.6, -0.3)
    f.line([(-0.6, 0.05), (-0.85, -0.15), (-0.92, tail)], 0.11, f.main)
    for x in (-0.5, -0.3, 0.22, 0.4):
        f.line([(x, 0.25), (x + 0.02, 0.88)], 0.15, f.main)
    f.blob([(-0.65, 0.0), (-0.1, -0.12), (0.4, -0.18), (0.52, 0.15), (0.3, 0.4), (-0.4, 0.38), (-0.66, 0.28)], f.main)
    f.blob([(0.25, -0.05), (0.28, -0.55), (0.5, -0.78), (0.72, -0.62), (0.98, -0.45), (0.95, -0.28), (0.68, -0.26),
            (0.5, 0.05)], f.main)
    f.blob([(0.36, -0.7), (0.48, -0.66), (0.44, -0.3), (0.3, -0.18), (0.24, -0.42)], f.second)
    f.oval(0.97, -0.42, 0.07, 0.06, "dark", fine=True)
    f.eye(0.64, -0.55, 0.06)


def duck(f: Figure, r: Rng) -> None:
    f.blob([(-0.95, -0.1), (-0.55, 0.1), (0.1, 0.05), (0.3, -0.2), (0.62, 0.05), (0.55, 0.5), (0.1, 0.7),
            (-0.5, 0.62), (-0.8, 0.35)], f.main)
    f.poly([(0.6, -0.52), (1.0, -0.45), (0.98, -0.28), (0.6, -0.25)], "orange")
    f.oval(0.38, -0.42, 0.32, 0.31, f.main)
    f.blob([(0.15, 0.15), (0.0, 0.48), (-0.5, 0.45), (-0.65, 0.1)], f.second)
    f.eye(0.48, -0.5, 0.07)


def guitar(f: Figure, r: Rng) -> None:
    f.box(-0.08, -0.8, 0.08, 0.1, "wood")
    f.box(-0.14, -1.0, 0.14, -0.78, r.pick(["dark", "wood"]))
    f.blob([(0, -0.1), (0.3, -0.08), (0.36, 0.15), (0.28, 0.32), (0.5, 0.6), (0.3, 0.92), (0, 0.97), (-0.3, 0.92),
            (-0.5, 0.6), (-0.28, 0.32), (-0.36, 0.15), (-0.3, -0.08)], f.main)
    f.oval(0, 0.3, 0.15, 0.15, "dark", fine=True)
    f.box(-0.2, 0.68, 0.2, 0.76, "dark", fine=True)
    f.line([(0, -0.8), (0, 0.7)], 0.03, "cream", fine=True)


def hammer(f: Figure, r: Rng) -> None:
    f.line([(0, -0.5), (0, 0.95)], r.between(0.14, 0.2), r.pick(["wood", f.main]))
    f.poly([(-0.6, -0.85), (0.35, -0.85), (0.75, -0.6), (0.35, -0.42), (-0.6, -0.42)], r.pick(["steel", f.second]))


def hat(f: Figure, r: Rng) -> None:
    brim, top = r.between(0.85, 0.98), r.between(0.38, 0.5)
    f.oval(0, 0.45, brim, 0.2, f.main)
    f.poly([(-0.52, 0.42), (-top, -0.5), (-0.1, r.between(-0.6, -0.42)), (top, -0.5), (0.52, 0.42), (0, 0.52)], f.main)
    f.poly([(-0.52, 0.42), (-0.5, 0.15), (0, 0.24), (0.5, 0.15), (0.52, 0.42), (0, 0.52)], f.second)


def heart(f: Figure, r: Rng) -> None:
    w = r.between(0.75, 0.95)
    f.blob([(0, -0.4), (w * 0.5, -0.75), (w, -0.35), (w * 0.6, 0.3), (0.04, 0.85), (-0.04, 0.85), (-w * 0.6, 0.3),
            (-w, -0.35), (-w * 0.5, -0.75)], f.main)


def horse(f: Figure, r: Rng) -> None:
    f.line([(-0.6, -0.1), (-0.85, 0.1), (-0.88, 0.5)], 0.14, f.second)
    step = r.between(-0.1, 0.1)
    for x, d in ((-0.5, step), (-0.34, -step), (0.2, step), (0.36, -step)):
        f.line([(x, 0.2), (x + d, 0.6), (x + d, 0.95)], 0.12, f.main)
    f.blob([(-0.65, -0.15), (-0.1, -0.15), (0.35, -0.25), (0.48, 0.1), (0.25, 0.32), (-0.4, 0.34),
            (-0.66, 0.18)], f.main)
    f.poly([(0.12, -0.15), (0.5, -0.85), (0.7, -0.8), (0.55, -0.4), (0.48, 0.1)], f.main)
    f.blob([(0.5, -0.88), (0.7, -0.86), (0.98, -0.5), (0.9, -0.36), (0.6, -0.5)], f.main)
    f.poly([(0.5, -0.92), (0.4, -0.82), (0.05, -0.2), (0.22, -0.22)], f.second)
    f.poly([(0.54, -0.85), (0.56, -1.02), (0.65, -0.85)], f.main, fine=True)
    f.eye(0.7, -0.7, 0.05)


def key(f: Figure, r: Rng) -> None:
    f.line(arc(-0.55, 0, 0.3, 0.3, 0, 359.9), 0.14, f.main)
    f.box(-0.25, -0.08, 0.95, 0.08, f.main)
    for x in (0.55, 0.8):
        f.box(x, 0.05, x + 0.12, r.between(0.28, 0.4), f.main)


def kite(f: Figure, r: Rng) -> None:
    f.line([(0, 0.4), (0.2, 0.6), (-0.1, 0.8), (0.15, 1.0)], 0.04, "dark", fine=True)
    side = r.between(0.5, 0.65)
    f.poly([(0, -1.0), (side, -0.3), (0, 0.45), (-side, -0.3)], f.main)
    f.poly([(0, -1.0), (side, -0.3), (0, -0.3)], f.second, fine=True)
    f.poly([(0, 0.45), (-side, -0.3), (0, -0.3)], f.second, fine=True)
    for y in (0.65, 0.88):
        f.poly([(-0.12, y - 0.08), (0.14, y + 0.08), (0.14, y - 0.08), (-0.12, y + 0.08)], f.second, fine=True)


def ladder(f: Figure, r: Rng) -> None:
    w, narrow = r.between(0.3, 0.4), r.between(0.0, 0.12)
    for i in range(6):
        y = -0.8 + i * 0.32
        f.line([(-w, y), (w, y)], 0.09, f.main)
    for s in (-1, 1):
        f.line([(s * w, 0.98), (s * (w - narrow), -0.98)], 0.11, f.main)


def lamp(f: Figure, r: Rng) -> None:
    f.line([(0, -0.1), (0, 0.85)], r.between(0.08, 0.2), f.second)
    f.oval(0, 0.86, r.between(0.35, 0.45), 0.11, f.second)
    top = r.between(0.2, 0.4)
    f.poly([(-top, -0.9), (top, -0.9), (0.65, -0.05), (-0.65, -0.05)], f.main)


def leaf(f: Figure, r: Rng) -> None:
    f.line([(0, 0.5), (0.08, 0.98)], 0.07, "wood")
    w = r.between(0.4, 0.6)
    f.blob([(0, -0.98), (w * 0.8, -0.45), (w, 0.1), (w * 0.6, 0.5), (0, 0.68), (-w * 0.6, 0.5), (-w, 0.1),
            (-w * 0.8, -0.45)], f.main)
    f.line([(0, -0.7), (0, 0.6)], 0.04, "dark", fine=True)
    for y in (-0.3, 0.0, 0.3):
        f.line([(-w * 0.6, y - 0.15), (0, y + 0.1), (w * 0.6, y - 0.15)], 0.03, "dark", fine=True)


def lighthouse(f: Figure, r: Rng) -> None:
    f.poly([(-0.32, 0.95), (-0.2, -0.45), (0.2, -0.45), (0.32, 0.95)], "white")
    for y in (-0.2, 0.25, 0.7):
        w = 0.22 + (y + 0.45) * 0.085
        f.poly([(-w, y - 0.1), (w, y - 0.1), (w + 0.02, y + 0.12), (-w - 0.02, y + 0.12)], f.main, fine=True)
    f.box(-0.28, -0.52, 0.28, -0.43, "dark")
    f.box(-0.15, -0.75, 0.15, -0.5, "yellow")
    f.poly([(-0.22, -0.74), (0, -1.0), (0.22, -0.74)], f.main)


def moon(f: Figure, r: Rng) -> None:
    thick = r.between(0.25, 0.5)
    f.poly([*arc(0, 0, 0.85, 0.85, 60, 300), *arc(thick, 0, 0.72, 0.74, 290, 70)], f.main)


def mushroom(f: Figure, r: Rng) -> None:
    w = r.between(0.18, 0.28)
    f.blob([(-w, -0.1), (w, -0.1), (w * 1.3, 0.8), (0, 0.92), (-w * 1.3, 0.8)], "cream")
    f.blob([(-0.85, -0.05), (-0.65, -0.6), (0, r.between(-0.95, -0.8)), (0.65, -0.6), (0.85, -0.05), (0, 0.08)], f.main)
    for x, y in ((-0.45, -0.3), (0.05, -0.6), (0.4, -0.28)):
        f.oval(x, y, 0.12, 0.1, r.pick(["white", f.second]), fine=True)


def pear(f: Figure, r: Rng) -> None:
    f.blob([(0, -0.7), (0.25, -0.55), (0.32, -0.1), (0.62, 0.35), (0.4, 0.85), (0, 0.93), (-0.4, 0.85), (-0.62, 0.35),
            (-0.32, -0.1), (-0.25, -0.55)], f.main)
    f.line([(0, -0.68), (r.between(-0.1, 0.1), -0.98)], 0.07, "wood")
    if r.chance(0.5):
        f.blob([(0.03, -0.75), (0.25, -0.95), (0.48, -0.88), (0.28, -0.7)], "leaf")


def person(f: Figure, r: Rng) -> None:
    for s in (-1, 1):
        f.line([(s * 0.12, 0.3), (s * r.between(0.15, 0.25), 0.95)], 0.17, f.second)
        f.line([(s * 0.2, -0.28), (s * r.between(0.4, 0.55), r.between(-0.4, 0.2))], 0.13, f.main)
    f.poly([(-0.28, -0.38), (0.28, -0.38), (0.25, 0.38), (-0.25, 0.38)], f.main)
    f.oval(0, -0.66, 0.25, 0.28, "skin")
    f.poly(arc(0, -0.7, 0.27, 0.27, 180, 360), r.pick(["dark", "wood", "yellow"]))
    for s in (-1, 1):
        f.oval(s * 0.09, -0.62, 0.035, 0.04, "dark", fine=True)


def plane(f: Figure, r: Rng) -> None:
    f.poly([(-0.75, -0.05), (-0.95, -0.5), (-0.75, -0.5), (-0.45, -0.1)], f.second)
    f.poly([(0.1, -0.05), (-0.2, -0.55), (-0.05, -0.55), (0.4, -0.05)], f.second)
    f.blob([(-0.9, -0.05), (-0.4, -0.18), (0.6, -0.18), (0.95, 0.02), (0.6, 0.18), (-0.5, 0.12)], f.main)
    f.poly([(0.15, 0.05), (-0.35, r.between(0.55, 0.7)), (-0.1, r.between(0.55, 0.7)), (0.45, 0.05)], f.second)
    for x in (-0.3, -0.05, 0.2):
        f.oval(x, -0.06, 0.05, 0.05, "glass", fine=True)
    f.poly([(0.6, -0.15), (0.8, -0.06), (0.55, -0.02)], "glass", fine=True)


def rabbit(f: Figure, r: Rng) -> None:
    for s in (-1, 1):
        f.oval(s * r.between(0.14, 0.22), -0.7, 0.11, 0.32, f.main, turn=s * 8)
        f.oval(s * 0.18, -0.68, 0.05, 0.2, "pink", turn=s * 8, fine=True)
    f.oval(r.pick([-1, 1]) * 0.42, 0.7, 0.14, 0.13, "white")
    f.oval(0, 0.5, 0.42, 0.44, f.main)
    f.oval(0, 0.55, 0.2, 0.26, "cream", fine=True)
    f.oval(0, -0.2, 0.34, 0.32, f.main)
    for s in (-1, 1):
        f.oval(s * 0.2, 0.9, 0.18, 0.09, f.main)
        f.oval(s * 0.13, -0.25, 0.05, 0.06, "dark", fine=True)
    f.oval(0, -0.13, 0.05, 0.04, "pink", fine=True)
    f.box(-0.05, -0.06, 0.05, 0.06, "white", fine=True)


def robot(f: Figure, r: Rng) -> None:
    for s in (-1, 1):
        f.line([(s * 0.2, 0.5), (s * 0.2, 0.95)], 0.16, "steel")
        f.line([(s * 0.4, 0.0), (s * 0.7, r.between(-0.2, 0.4))], 0.13, "steel")
    f.line([(0, -0.7), (0, -0.95)], 0.05, "dark")
    f.oval(0, -0.95, 0.07, 0.07, "red", fine=True)
    f.box(-0.42, -0.1, 0.42, 0.6, f.main)
    f.box(-0.35, -0.75, 0.35, -0.16, f.main)
    for s in (-1, 1):
        f.oval(s * 0.16, -0.5, 0.09, 0.09, "yellow", fine=True)
    f.box(-0.18, -0.32, 0.18, -0.25, "dark", fine=True)
    f.box(-0.2, 0.1, 0.2, 0.35, f.second, fine=True)


def rocket(f: Figure, r: Rng) -> None:
    f.blob([(-0.18, 0.6), (0.18, 0.6), (0.08, r.between(0.85, 1.0)), (0, 0.8), (-0.1, 0.92)], "orange")
    for s in (-1, 1):
        f.poly([(s * 0.2, 0.1), (s * 0.6, 0.65), (s * 0.2, 0.55)], f.second)
    f.blob([(0, -0.98), (0.24, -0.5), (0.3, 0.1), (0.2, 0.62), (-0.2, 0.62), (-0.3, 0.1), (-0.24, -0.5)], f.main)
    f.poly([(0, -0.98), (0.2, -0.58), (-0.2, -0.58)], f.second)
    f.oval(0, -0.2, 0.13, 0.13, "glass")


def snail(f: Figure, r: Rng) -> None:
    f.blob([(-0.95, 0.7), (-0.3, 0.5), (0.4, 0.45), (0.55, -0.1), (0.85, -0.15), (0.92, 0.3), (0.6, 0.75),
            (-0.2, 0.82)], "cream")
    for x in (0.6, 0.82):
        f.line([(x, -0.1), (x + 0.06, -0.42)], 0.05, "cream")
        f.oval(x + 0.06, -0.44, 0.05, 0.05, "dark", fine=True)
    size = r.between(0.5, 0.58)
    f.oval(-0.15, 0.1, size, size, f.main)
    f.line([*arc(-0.15, 0.1, size * 0.68, size * 0.68, -30, 250),
            *arc(-0.15, 0.1, size * 0.36, size * 0.36, 250, 500)], 0.07, f.second)


def snake(f: Figure, r: Rng) -> None:
    wave = r.between(0.25, 0.4)
    body = [(-0.9, 0.5)]
    for i in range(16):
        (_, y), *_ = arc(0, 0, 1, wave, i * 48, i * 48 + 1)
        body.append((-0.8 + i * 0.085, 0.35 - i * 0.03 + y))
    f.line([*body, (0.65, -0.45)], r.between(0.17, 0.22), f.main)
    f.line([(0.85, -0.5), (1.02, -0.5)], 0.04, "red", fine=True)
    f.oval(0.7, -0.5, 0.2, 0.15, f.main)
    f.eye(0.74, -0.55, 0.05)


def snowman(f: Figure, r: Rng) -> None:
    for s in (-1, 1):
        f.line([(s * 0.3, 0.0), (s * 0.8, r.between(-0.35, 0.0))], 0.06, "wood")
    f.oval(0, 0.55, 0.46, 0.4, "white")
    f.oval(0, -0.02, 0.34, 0.3, "white")
    f.oval(0, -0.48, 0.25, 0.24, "white")
    f.box(-0.3, -0.7, 0.3, -0.62, f.main)
    f.box(-0.19, -0.98, 0.19, -0.66, f.main)
    f.line([(-0.25, -0.27), (0, -0.22), (0.25, -0.27)], 0.1, f.second)
    f.poly([(0, -0.5), (0.25, -0.43), (0, -0.4)], "orange", fine=True)
    for s in (-1, 1):
        f.oval(s * 0.09, -0.54, 0.03, 0.03, "dark", fine=True)
    for y in (0.0, 0.4):
        f.oval(0, y, 0.04, 0.04, "dark", fine=True)


def star(f: Figure, r: Rng) -> None:
    deep = r.between(0.36, 0.48)
    points = []
    for i in range(5):
        for radius, shift in ((0.95, -90), (deep, -54)):
            points += arc(0, 0.05, radius, radius, i * 72 + shift, i * 72 + shift + 1)[:1]
    f.poly(points, f.main)


def table(f: Figure, r: Rng) -> None:
    top = r.between(-0.3, -0.1)
    for x, low in ((-0.55, 0.55), (0.6, 0.55), (-0.75, 0.85), (0.8, 0.85)):
        f.line([(x, top), (x, low)], 0.1, r.pick(["wood", f.main]))
    f.poly([(-0.7, top - 0.25), (0.75, top - 0.25), (0.98, top + 0.05), (-0.95, top + 0.05)], f.main)
    f.box(-0.95, top + 0.05, 0.98, top + 0.15, f.main)


def teapot(f: Figure, r: Rng) -> None:
    f.line(arc(-0.55, 0.1, 0.35, 0.34, 90, 270), 0.12, f.main)
    f.poly([(0.35, 0.3), (0.72, 0.0), (0.82, -0.35), (0.98, -0.35), (0.85, 0.15), (0.45, 0.6)], f.main)
    f.blob([(-0.35, -0.35), (0.35, -0.35), (0.62, 0.15), (0.4, 0.68), (-0.4, 0.68), (-0.62, 0.15)], f.main)
    f.poly([(-0.35, -0.34), *arc(0, -0.34, 0.35, 0.24, 180, 360)], f.second)
    f.oval(0, -0.65, 0.1, 0.1, f.second)
    if r.chance(0.5):
        f.oval(0, 0.2, 0.22, 0.2, f.second, fine=True)


def tent(f: Figure, r: Rng) -> None:
    depth = r.between(0.2, 0.4)
    f.poly([(-0.2, -0.7), (depth, -0.8), (0.98, 0.6), (0.45, 0.75)], f.second)
    f.poly([(-0.9, 0.75), (-0.2, -0.72), (0.5, 0.75)], f.main)
    f.poly([(-0.45, 0.75), (-0.2, -0.3), (0.08, 0.75)], "dark")


def truck(f: Figure, r: Rng) -> None:
    f.box(-0.98, r.between(-0.65, -0.45), 0.35, 0.35, f.second)
    f.poly([(0.4, -0.25), (0.72, -0.25), (0.95, 0.05), (0.95, 0.35), (0.4, 0.35)], f.main)
    f.poly([(0.5, -0.15), (0.68, -0.15), (0.83, 0.05), (0.5, 0.05)], "glass", fine=True)
    f.box(-0.98, 0.33, 0.95, 0.43, "dark")
    for x in (-0.65, -0.2, 0.65):
        f.oval(x, 0.47, 0.19, 0.19, "dark")
        f.oval(x, 0.47, 0.08, 0.08, "steel", fine=True)


def umbrella(f: Figure, r: Rng) -> None:
    f.line([(0, -0.7), (0, 0.75), *arc(0.13, 0.75, 0.13, 0.16, 180, 0)], 0.07, r.pick(["wood", "dark"]))
    low = r.between(-0.05, 0.1)
    scallops = [p for i in range(4) for p in arc(0.69 - i * 0.46, low, 0.23, 0.14, 0, -180)]
    f.poly([*arc(0, low, 0.92, r.between(0.75, 0.85), 180, 360), *scallops], f.main)
    f.poly([*arc(0, low, 0.4, 0.78, 180, 360), *arc(0.23, low, 0.23, 0.14, 0, -180),
            *arc(-0.23, low, 0.23, 0.14, 0, -180)], f.second, fine=True)
    f.line([(0, -0.75), (0, -0.98)], 0.06, "dark", fine=True)


FIGURES: dict[str, Callable[[Figure, Rng], None]] = {
    draw.__name__: draw
    for draw in (
        *(apple, ball, balloon, bird, boat, book, bottle, bus, butterfly, cactus, car, castle, cat, chair, clock, cup),
        *(dog, duck, fish, flower, guitar, hammer, hat, heart, horse, house, key, kite, ladder, lamp, leaf, lighthouse),
        *(moon, mushroom, pear, person, plane, rabbit, robot, rocket, snail, snake, snowman, star, table, teapot),
        *(tent, tree, truck, umbrella),
    )
}

CLASSES = ("bird", "boat", "car", "cat", "chair", "cup", "fish", "flower", "house", "tree")
