"""The plots of a sweep: the gain of each method on seen and unseen domains, and its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fedclip_flwr.base.text import bytes_of
from fedclip_flwr.report.drawing import Plot, apart, canvas, room_for, write
from fedclip_flwr.report.theme import LIGHT

WIDTH, HEIGHT, LEFT, LINE = 380, 380, 64, 14


class Point(NamedTuple):
    """A method's gains over zero-shot in points, with their deviations over the seeds, and a round's bytes."""

    label: str
    seen: float
    unseen: float | None
    seen_deviation: float | None
    unseen_deviation: float | None
    bytes: int | None


def of_sweep(points: Sequence[Point]) -> list[Plot]:
    """All plots for which there are data."""
    plots = [
        gains([point for point in points if point.unseen is not None]),
        by_bytes([point for point in points if point.bytes]),
    ]
    return [plot for plot in plots if plot]


def gains(points: Sequence[Point]) -> Plot | None:
    """Gain on the unseen domain against gain at the sites."""
    if not points:
        return None
    figure, axes = _axes(points)
    axes.grid()
    for zero in (axes.axhline, axes.axvline):
        zero(0, color=LIGHT["zero"], linewidth=1)
    for point in points:
        _point(axes, point.seen, point.unseen or 0.0, point.unseen_deviation, point.seen_deviation)
    _named(axes, [(point.label, point.seen, point.unseen or 0.0) for point in points])
    axes.set_xlabel("gain over zero-shot at the sites, points")
    axes.set_ylabel("gain where no site trained, points")
    says = "; ".join(f"{point.label} {point.seen:+.1f} and {point.unseen:+.1f}" for point in points)
    return Plot("gains", "Gains over zero-shot, seen and unseen", f"Points seen and unseen: {says}.", figure)


def by_bytes(points: Sequence[Point]) -> Plot | None:
    """Both gains against the bytes of a site and round."""
    if not points:
        return None
    figure, axes = _axes(points)
    axes.set_xscale("log")
    axes.grid()
    axes.axhline(0, color=LIGHT["zero"], linewidth=1)
    for point in points:
        if point.unseen is not None:
            _point(axes, point.bytes or 1, point.unseen, point.unseen_deviation, None, "unseen")
        _point(axes, point.bytes or 1, point.seen, point.seen_deviation, None)
    low, high = axes.get_xlim()
    axes.set_xlim(low / 2, high * 2)
    _named(axes, [(point.label, float(point.bytes or 1), point.seen) for point in points])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_of(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes of a site and round, there and back")
    axes.set_ylabel("gain, points: ● at the sites, ○ where no site trained")
    says = "; ".join(f"{point.label} {point.seen:+.1f} for {bytes_of(point.bytes or 1)}" for point in points)
    return Plot("bytes", "Gains over zero-shot, and bytes", f"Points at the sites: {says}.", figure)


def _axes(points: Sequence[Point]) -> tuple[Figure, Axes]:
    right = room_for([point.label for point in points], size=9)
    return canvas(HEIGHT, width=WIDTH + LEFT + right, left=LEFT, right=right, bottom=48)


def _point(axes: Axes, x: float, y: float, deviation: float | None, across: float | None, role: str = "seen") -> None:
    face = LIGHT[role] if role == "seen" else LIGHT["paper"]
    axes.errorbar([x], [y], deviation, across, "o", color=LIGHT[role], mfc=face, markersize=7, elinewidth=1, zorder=3)


def _named(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Labels each point at the right of the axes, with a line to it."""
    low, high = axes.get_ylim()
    scale = (HEIGHT - 60) / (high - low)
    places = [place / scale for place in apart([y * scale for *_, y in points], LINE)]
    across = axes.get_yaxis_transform()
    arrow: dict[str, Any] = {"arrowstyle": "-", "color": LIGHT["line"], "linewidth": 0.8}
    for (name, x, y), place in zip(points, places, strict=True):
        axes.annotate("", (x, y), (1.01, place), textcoords=across, arrowprops=arrow, zorder=1)
        write(axes, 1.02, place, name, "soft", va="center", fontsize=11, transform=across)
