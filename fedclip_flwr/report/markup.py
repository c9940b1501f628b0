"""The pieces of a page. All text from outside goes through `e`, and nothing refers to another place."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedclip_flwr.base import text
from fedclip_flwr.base.errors import shown
from fedclip_flwr.report.theme import DARK, LIGHT, variables

if TYPE_CHECKING:
    from fedclip_flwr.report.drawing import Plot

Figures = Mapping[str, tuple["Plot", str]]


def e(text: object) -> str:
    """The text, escaped for HTML and without control characters."""
    return html.escape(shown(text))


def gain(zero: float | None, adapted: float | None) -> str:
    """The difference of the rounded figures, with a true minus sign."""
    return text.gain(zero, adapted).replace("-", "−")


def setting(value: object) -> str:
    """A setting's value as given on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def page(title: str, parts: Iterable[str]) -> str:
    """A complete, self-contained page."""
    css = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}"
    themes = f":root {{ {variables(LIGHT)} }}\n{dark}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{e(title)}</title>",
            f"<style>\n{themes}\n{css}</style>",
            "</head>",
            "<body>",
            "<main>",
            *(part for part in parts if part),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def section(name: str, heading: str, *parts: str, lead: str = "") -> str:
    """A section of the page; empty if it has no content."""
    if not (body := "\n".join(part for part in parts if part)):
        return ""
    intro = f'<p class="lead">{lead}</p>\n' if lead else ""
    return f'<section id="{name}">\n<h2>{e(heading)}</h2>\n{intro}{body}\n</section>'


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, words: int = 1) -> str:
    """A table: the first `words` columns are text, the others numbers."""

    def row(cells: Sequence[object], kind: str) -> str:
        marks = [
            f"<{kind}{'' if number < words else ' class=number'}>{e(cell)}</{kind}>"
            for number, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(marks)}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>\n<thead>{row(head, "th")}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def details(heading: str, body: str) -> str:
    return f"<details>\n<summary>{e(heading)}</summary>\n{body}\n</details>"


def plots(figures: Figures, *names: str | Sequence[str], more: str = "") -> str:
    """The plots that exist, side by side if there is room, then `more`. Plots in a list are one below another."""
    made = []
    for name in names:
        below = [_figure(*figures[one]) for one in ([name] if isinstance(name, str) else name) if one in figures]
        made += below if isinstance(name, str) or not below else [f'<div class="stack">{chr(10).join(below)}</div>']
    made += [more] if more else []
    return f'<div class="plots">\n{chr(10).join(made)}\n</div>' if made else ""


def _figure(plot: Plot, svg: str) -> str:
    wide = " wide" if plot.width > 600 else ""
    note = f'<p class="note">{e(plot.note)}</p>' if plot.note else ""
    return (
        f'<figure class="plot{wide}">\n<figcaption><h3>{e(plot.heading)}</h3>{note}</figcaption>\n'
        f'<div class="scroll" style="--width: {plot.width:.0f}px">{svg}</div>\n</figure>'
    )


def tile(name: str, figure: str, *, unit: str = "", below: str = "", role: str = "ink") -> str:
    """A key figure."""
    shown_unit = f'<span class="unit">{e(unit)}</span>' if unit else ""
    return (
        f'<div class="tile"><div class="name">{e(name)}</div>'
        f'<div class="figure {role}">{e(figure)}{shown_unit}</div><div class="below">{e(below)}</div></div>'
    )


def aside(text: str) -> str:
    """A sentence on something that is missing."""
    return f'<p class="aside">{e(text)}</p>'
