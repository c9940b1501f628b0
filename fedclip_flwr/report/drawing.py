"""Draws plots without a screen, in colours that follow the page's theme, and with the same bytes each time.

A figure is drawn in the colours of the light theme. Each colour has one role only, so the page can replace it with a
variable, which has another value in the dark theme.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from fedclip_flwr.report.theme import LIGHT

WIDTH = 440
"""The width of most plots, in CSS pixels."""
PIXELS = 72
"""CSS pixels per inch, so that a point is one pixel."""

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": LIGHT["ink"],
    "figure.facecolor": LIGHT["paper"],
    "figure.dpi": PIXELS,
    "axes.facecolor": "none",
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.labelsize": 12,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "xtick.major.size": 4,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "fedclip",
    "text.parse_math": False,  # names may have dollars
}


class Plot(NamedTuple):
    """A figure with its name (also of its files), the heading above it, and `says`: its content as text."""

    name: str
    heading: str
    says: str
    figure: Figure
    note: str = ""

    @property
    def width(self) -> float:
        return float(self.figure.get_size_inches()[0]) * PIXELS


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """The context in which plots are drawn and written."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # missing in this font: the page has other fonts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def canvas(
    height: float, *, left: float = 44, right: float = 16, top: float = 12, bottom: float = 40, width: float = WIDTH
) -> tuple[Figure, Axes]:
    """An empty figure of that size with these margins, all in CSS pixels."""
    figure = Figure(figsize=(width / PIXELS, height / PIXELS))
    FigureCanvasAgg(figure)
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return figure, figure.add_axes(box)


def as_svg(plot: Plot) -> str:
    """The figure as a standalone SVG file, in the light theme."""
    file = io.StringIO()
    plot.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return file.getvalue()


def as_png(plot: Plot) -> bytes:
    """The figure as a PNG file, at twice the resolution."""
    file = io.BytesIO()
    plot.figure.savefig(file, format="png", dpi=2 * PIXELS, metadata={"Software": None})
    return file.getvalue()


def inline(svg: str, name: str, says: str) -> str:
    """The SVG as a part of the page: it follows the theme, and its ids are unique in the page."""
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="([^"]+)"', svg)
    body = svg[svg.index(">") + 1 :]
    used = {*re.findall(r'(?:url\(#|href="#)([^")]+)', body)}
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|xlink:href="#)', lambda m: f"{m[1].replace('xlink:', '')}{name}-", body)
    body = re.sub(r'style="[^"]*"', _as_the_page, body)
    body = re.sub(r"\n\s*", "\n", body)
    for role, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{role})")
    head = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{html.escape(says)}">'
    return f"{head}<title>{html.escape(says)}</title>{body}"


def _as_the_page(style: re.Match[str]) -> str:
    """The style without its font."""
    return re.sub(r"font-family: [^;\"]+;? ?", "", re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", style[0]))


def apart(positions: list[float], gap: float) -> list[float]:
    """The positions, moved just enough that no two are closer than the gap. Their order is kept."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    groups: list[list[int]] = []

    def centre(group: list[int]) -> float:
        return sum(positions[i] for i in group) / len(group)

    for i in order:
        groups.append([i])
        while (
            len(groups) > 1 and centre(groups[-1]) - centre(groups[-2]) < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    places = list(positions)
    for group in groups:
        for place, i in enumerate(group):
            places[i] = centre(group) + gap * (place - (len(group) - 1) / 2)
    return places


def short(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def room_for(texts: list[str], least: float = 24, size: float = 12) -> float:
    """The margin that labels of that font size need."""
    return max([least, *(0.72 * size * len(text) + 12 for text in texts)])


def write(axes: Axes, x: float, y: float, text: str, role: str = "ink", **how: Any) -> Text:
    """Adds text at data coordinates."""
    return axes.text(x, y, text, color=LIGHT[role], **how)


def name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float, size: float = 12) -> None:
    """Labels lines at the right of the axes: each end has its height, its label and its role."""
    low, high = axes.get_ylim()
    scale, across = 248 / (high - low), axes.get_yaxis_transform()
    for (_, text, role), place in zip(ends, apart([y * scale for y, _, _ in ends], gap), strict=True):
        role = "soft" if role == "zero" else role
        write(axes, 1.03, place / scale, text, role, va="center", fontsize=size, transform=across)
