"""Numbers, sizes and tables as text, for the terminal, reports and model cards alike."""

from __future__ import annotations

import re
from collections.abc import Sequence


def natural(name: str) -> list[tuple[str, int]]:
    """A sort key that puts site-2 before site-10."""
    return [(text, int(part or -1)) for text, part in re.findall(r"(\D*)(\d*)", name)]


def percent(share: float | None) -> str:
    """The share in percent with one decimal; – for None."""
    return "–" if share is None else f"{100 * share:.1f}"


def gain(zero: float | None, adapted: float | None) -> str:
    """The difference of the two percentages as they are shown."""
    return "–" if zero is None or adapted is None else f"{round(100 * adapted, 1) - round(100 * zero, 1):+.1f}"


def bytes_of(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def counted(number: int, what: str) -> str:
    ending = "es" if what.endswith("s") else "s"
    return f"{number} {what}" if number == 1 else f"{number} {what}{ending}"


def some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def table(rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """The rows as aligned columns: the first `left` columns to the left, the others to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    return "\n".join(
        "  "
        + "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in texts
    )
