"""The plots of the server's held-out images: confusion, calibration, recall, and the adapter's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from fedclip_flwr.learning import metrics
from fedclip_flwr.learning.metrics import BINS
from fedclip_flwr.report.drawing import Plot, canvas, room_for, short, write
from fedclip_flwr.report.plots import MOST_ROWS, dumbbells, percent
from fedclip_flwr.report.theme import LIGHT, STEPS

NUMBERED, DRAWN = 20, 80
"""Up to how many classes a confusion matrix has numbers, and is drawn at all; beyond, only the most confused pairs."""
PAIRS = 16
WHO = {"zero_shot": "zero-shot", "adapted": "adapted"}


def of_held_out(found: dict[str, Any]) -> list[Plot]:
    """All plots for which there are data."""
    if not found["images"]:
        return []
    classes = len(found["class_names"])
    drawn = [confusion(found, who) for who in WHO] if classes <= DRAWN else []
    made = [*drawn, *([pairs(found)] if classes > NUMBERED else []), calibration(found), recall(found), weights(found)]
    return [plot for plot in made if plot]


def recalls(found: dict[str, Any], who: str) -> dict[int, float]:
    """The recall of each class, by the class's number."""
    right = {true: count for true, predicted, count in found[who]["confusion"] if true == predicted}
    return {true: right.get(true, 0) / total for true, total in totals_of(found, who).items()}


def totals_of(found: dict[str, Any], who: str) -> Counter[int]:
    """The images of each class, by the class's number."""
    totals = Counter[int]()
    for true, _, count in found[who]["confusion"]:
        totals[true] += count
    return totals


def confused(found: dict[str, Any], who: str) -> dict[tuple[int, int], int]:
    """The number of images of the true class that were predicted as the other one."""
    return {(true, other): count for true, other, count in found[who]["confusion"] if true != other}


def cells(axes: Axes, rows: int, columns: int, role_of: Callable[[int, int], str | None]) -> None:
    """Draws squares in the colours of these roles, row 0 at the top. Squares of one colour are one path."""
    corners: dict[str, list[tuple[float, float]]] = {}
    for row in range(rows):
        for column in range(columns):
            if role := role_of(row, column):
                x, y = column - 0.48, rows - 1 - row - 0.48
                corners.setdefault(role, []).extend(
                    [(x, y), (x + 0.96, y), (x + 0.96, y + 0.96), (x, y + 0.96), (x, y)]
                )
    codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY]
    for role, points in sorted(corners.items()):
        axes.add_patch(PathPatch(Path(points, codes * (len(points) // 5)), facecolor=LIGHT[role], edgecolor="none"))
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(-0.5, rows - 0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def shade(share: float, side: str = "more") -> str | None:
    """The role of a cell for a share from 0 to 1; None for 0."""
    return f"{side}-{step_of(share)}" if share > 0 else None


def step_of(share: float) -> int:
    """The number of the share's shade."""
    return min(round(share * (STEPS - 1)), STEPS - 1)


def confusion(found: dict[str, Any], who: str) -> Plot:
    """The confusion matrix, in shares of each true class."""
    names = [short(name, 14) for name in found["class_names"]]
    numbered = len(names) <= NUMBERED
    totals = totals_of(found, who)
    shares = {(true, predicted): count / totals[true] for true, predicted, count in found[who]["confusion"]}
    size = 12.0 if len(names) <= 12 else 10.0 if numbered else 8.5
    side = room_for(names, size=size)
    width = 440 if numbered else 900
    figure, axes = canvas(width - 8, left=side, right=8, top=8, bottom=side, width=width)
    nothing = "more-0" if numbered else None  # of many classes, empty cells are not drawn
    axes.set_facecolor("none" if numbered else LIGHT["more-0"])
    cells(axes, len(names), len(names), lambda row, column: shade(shares.get((row, column), 0.0)) or nothing)
    if numbered:
        for (true, predicted), share in shares.items():
            if share >= 0.005:
                role = "strong" if step_of(share) >= STEPS - 2 else "ink"
                write(
                    axes,
                    predicted,
                    len(names) - 1 - true,
                    f"{100 * share:.0f}",
                    role,
                    ha="center",
                    va="center",
                    fontsize=size - 1,
                )
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), reversed(names), fontsize=size)
    accuracy = 100 * found[who]["correct"] / found["images"]
    says = f"Confusion matrix, {WHO[who]}: {accuracy:.1f} % of {found['images']:,} images are right."
    note = "Rows: the true class; columns: the predicted class; % of the row."
    return Plot(f"confusion-{WHO[who]}", f"Confusion, {WHO[who]}: {accuracy:.1f} % right", says, figure, note)


def pairs(found: dict[str, Any]) -> Plot | None:
    """The most confused pairs of classes, before and after."""
    before, after = (confused(found, who) for who in WHO)
    chosen = sorted({*before, *after}, key=lambda pair: (-max(before.get(pair, 0), after.get(pair, 0)), pair))[:PAIRS]
    if not chosen:
        return None
    names = [short(name, 13) for name in found["class_names"]]
    labels = [f"{names[true]} → {names[other]}" for true, other in chosen]
    rows = [(label, before.get(pair, 0), after.get(pair, 0), None) for label, pair in zip(labels, chosen, strict=True)]
    figure, axes = dumbbells(rows, ["unseen"] * len(rows), "images")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter("{x:.0f}")
    says = f"The {len(chosen)} most confused pairs of classes, by images of the true class predicted as the other one."
    return Plot(
        "pairs", "The most confused pairs", says, figure, "true class → predicted class;  ○ zero-shot  ● adapted"
    )


def calibration_error(found: dict[str, Any], who: str) -> float:
    """The expected calibration error, from the analysis's bins."""
    bins = found[who]["bins"]
    gaps = (confidence - right for confidence, right in zip(bins["confidence"], bins["correct"], strict=True))
    return metrics.calibration_error(gaps, found["images"])


def calibration(found: dict[str, Any]) -> Plot:
    """A reliability diagram: accuracy by confidence."""
    figure, axes = canvas(330, right=20, bottom=44)
    axes.plot([0, 1], [0, 1], color=LIGHT["soft"], linewidth=1, dashes=(4, 3))
    errors = []
    for who, role in (("zero_shot", "zero"), ("adapted", "unseen")):
        bins = found[who]["bins"]
        rows = [row for row in zip(bins["images"], bins["confidence"], bins["correct"], strict=True) if row[0]]
        at = [(confidence / images, right / images, images / found["images"]) for images, confidence, right in rows]
        axes.plot(
            *zip(*((x, y) for x, y, share in at if share >= 0.005), strict=True), color=LIGHT[role], linewidth=1.2
        )
        x, y, shares = zip(*at, strict=True)
        sizes = [14 + 320 * share for share in shares]
        axes.scatter(x, y, sizes, color=LIGHT[role], edgecolor=LIGHT["paper"], linewidth=0.8, zorder=3, clip_on=False)
        error = f"{WHO[who]}: error {100 * calibration_error(found, who):.1f} %"
        errors.append((error, "soft" if role == "zero" else role))
    for place, (text, role) in enumerate(reversed(errors)):
        write(axes, 0.98, 0.03 + 0.065 * place, f"● {text}", role, ha="right", transform=axes.transAxes)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.grid()
    for along in "xy":
        percent(axes, along)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("right, %", labelpad=2)
    summary = " ".join(f"{text}." for text, _ in errors)
    note = f"{BINS} bins, dots sized by their share of the images. Below the dashed line: overconfident."
    return Plot("calibration", "Calibration", f"Reliability diagram with {BINS} bins. {summary}", figure, note)


def recall(found: dict[str, Any]) -> Plot:
    """The recall of each class, before and after; of many classes those that change most."""
    before, after = (recalls(found, who) for who in WHO)
    names, kept = found["class_names"], sorted(after, key=lambda c: (-abs(after[c] - before[c]), c))[:MOST_ROWS]
    kept.sort(key=lambda c: (-after[c], -before[c], c))
    rows = [(short(names[number]), before[number], after[number], None) for number in kept]
    figure, _ = dumbbells(rows, ["unseen"] * len(rows), "recognised, %")
    some = f" of the {len(rows)} classes that change most" if len(after) > len(rows) else " by class"
    says = "; ".join(f"{names[c]} {100 * before[c]:.0f} to {100 * after[c]:.0f} %" for c in kept)
    return Plot("recall", f"Recall{some}, %", f"Recall{some}: {says}.", figure, "○ zero-shot  ● adapted")


def weights(found: dict[str, Any]) -> Plot | None:
    """By how many doublings the adapter weights some dimensions more or less, by class."""
    table = found["weights"]
    most = greatest(found)
    if not most:
        return None
    rows = strongest_classes(table)
    names = [short(found["class_names"][table["classes"][row]], 14) for row in rows]
    high, left = len(rows), room_for([*names])
    figure, axes = canvas(high * 19 + 102, left=left, right=8, top=4, bottom=98)

    def role(row: int, column: int) -> str:
        value = table["values"][rows[row]][column]
        return shade(min(abs(value) / most, 1.0), "more" if value > 0 else "less") or "more-0"

    columns = len(table["dimensions"])
    cells(axes, high, columns, role)
    axes.set_yticks(range(high), reversed(names))
    axes.set_xticks(range(columns), [str(number) for number in table["dimensions"]], rotation=90, fontsize=10)
    axes.set_xlabel("dimension of the feature", labelpad=7)
    _key(figure, left, most)
    says = f"Weights of {columns} dimensions for {high} classes, from {-most:.2f} to {most:+.2f} doublings."
    return Plot("weights", "Weights by class and dimension", says, figure)


def _key(figure: Any, left: float, most: float) -> None:
    """Draws the colour scale below the plot."""
    width, height = (size * 72 for size in figure.get_size_inches())
    axes = figure.add_axes((left / width, 20 / height, (width - left - 8) / width, 9 / height))
    cells(
        axes,
        1,
        2 * STEPS,
        lambda _, column: f"less-{STEPS - 1 - column}" if column < STEPS else f"more-{column - STEPS}",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for x, text, align in (
        (0.0, f"−{most:.2g} doublings", "left"),
        (0.5, "0", "center"),
        (1.0, f"+{most:.2g}", "right"),
    ):
        write(axes, x, -0.7, text, "soft", ha=align, va="top", fontsize=11, transform=axes.transAxes)


def greatest(found: dict[str, Any]) -> float:
    """The largest of the shown weights; 0 if there are none, or if all are equal."""
    table = found["weights"] or {"values": []}
    return max((abs(value) for row in table["values"] for value in row), default=0.0)


def strongest_classes(table: dict[str, Any], most: int = 40) -> Sequence[int]:
    """The rows of the classes with the strongest weights, in the order of the classes."""
    strength = [sum(value * value for value in row) for row in table["values"]]
    return sorted(sorted(range(len(strength)), key=lambda row: (-strength[row], row))[:most])
