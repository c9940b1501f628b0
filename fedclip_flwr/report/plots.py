"""The plots of a run that need no image: rounds, sites, bytes and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedclip_flwr.base.settings import LORA
from fedclip_flwr.base.text import bytes_of
from fedclip_flwr.report.drawing import Plot, canvas, name_ends, room_for, short, write
from fedclip_flwr.report.story import Story
from fedclip_flwr.report.theme import LIGHT

MOST_ROWS = 24
"""Sites or classes that are shown one by one, at most."""
ROW = 21
"""The height of a row."""


def percent(axes: Axes, along: str) -> None:
    """Labels an axis of fractions in per cent."""
    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}"))


def of_run(story: Story) -> list[Plot]:
    """All plots for which there are data."""
    made = [rounds(story), sites(story), spread(story), traffic(story), phases(story), pace(story)]
    return [plot for plot in made if plot]


def rounds(story: Story) -> Plot | None:
    """The accuracy after each round, compared with the start."""
    keys = [key for key in ("seen", "unseen") if any(line[key] is not None for line in story.lines)]
    if len(story.lines) < 2 or not keys:
        return None
    selected = story.run.selected
    figure, axes = canvas(300, right=112)
    axes.grid(axis="y")
    ends: list[tuple[float, str, str]] = []
    for key in ("val", *keys):
        known = [(line["round"], line[key]) for line in story.lines if line.get(key) is not None]
        if not known:
            continue
        light = key == "val"
        role = "zero" if light else key
        axes.plot(*zip(*known, strict=True), color=LIGHT[role], linewidth=1 if light else 2.2, zorder=2 if light else 3)
        ends.append((known[-1][1], f"{'validation' if light else key} {100 * known[-1][1]:.1f}", role))
        if not light and (zero := story.zero[key]) is not None:
            axes.axhline(zero, color=LIGHT[role], linewidth=1.2, dashes=(4, 3), zorder=2)
            ends.append((zero, f"{story.run.start} {100 * zero:.1f}", role))
        if not light and selected is not None and selected in dict(known):
            at = dict(known)[selected]
            axes.plot([selected], [at], "o", color=LIGHT[role], markersize=9, markeredgecolor=LIGHT["paper"], zorder=4)
    last = max(line["round"] for line in story.lines)
    axes.set_xlim(0, last)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low - 0.02, -0.02), min(high + 0.02, 1.02))
    name_ends(axes, ends, 15)
    if selected is not None:
        axes.axvline(selected, color=LIGHT["line"], linewidth=1, zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("round")
    percent(axes, "y")
    labels = "; ".join(text for _, text, _ in ends)
    chosen = f" The dots mark round {selected}, which was selected." if selected is not None else ""
    return Plot(
        "rounds",
        "Accuracy over rounds, %",
        f"Accuracy after each of {last} rounds: {labels}.{chosen}",
        figure,
        f"Dashed: {story.run.start}.{chosen}",
    )


def dumbbells(
    rows: Sequence[tuple[str, float | None, float | None, float | None]], roles: Sequence[str], label: str
) -> tuple[Figure, Axes]:
    """A figure with a line for each row: name, zero-shot, adapted and own accuracy, the first row at the top."""
    figure, axes = canvas(len(rows) * ROW + 58, left=room_for([row[0] for row in rows]))
    ring: dict[str, Any] = {"color": LIGHT["paper"], "markeredgecolor": LIGHT["zero"], "markeredgewidth": 1.6}
    for place, ((_, zero, adapted, own), role) in enumerate(zip(rows, roles, strict=True)):
        y = len(rows) - 1 - place
        if zero is not None and adapted is not None:
            axes.plot([zero, adapted], [y, y], color=LIGHT[role], linewidth=2, alpha=0.45, zorder=2)
        if zero is not None:
            axes.plot([zero], [y], "o", markersize=6, zorder=3, **ring)
        if own is not None:
            axes.plot([own], [y], "D", color=LIGHT["own"], markersize=5.5, zorder=4)
        if adapted is not None:
            axes.plot([adapted], [y], "o", color=LIGHT[role], markersize=7, zorder=3)
    axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)
    percent(axes, "x")
    return figure, axes


def sites(story: Story) -> Plot | None:
    """The accuracy of each site before and after; of many sites the best and the weakest."""
    own, apart_from = story.personal, story.adapted["holdout_sites"]
    adapted = {**story.adapted["sites"], **apart_from}
    zero = {**story.zero["sites"], **story.zero["holdout_sites"]}
    names = sorted(adapted, key=lambda name: (-(adapted[name] or 0.0), name))
    if not names:
        return None
    left_out = len(names) - MOST_ROWS
    if left_out > 0:
        names = [*names[: MOST_ROWS // 2], *names[-MOST_ROWS // 2 :]]
    rows = [
        (short(f"{name}, unseen" if name in apart_from else name), zero.get(name), adapted[name], own.get(name))
        for name in names
    ]
    roles = ["unseen" if name in apart_from else "seen" for name in names]
    figure, axes = dumbbells(rows, roles, "test accuracy, %")
    if left_out > 0:
        axes.axhline(MOST_ROWS / 2 - 0.5, color=LIGHT["soft"], linewidth=1, dashes=(1, 3))
    which = (
        f"The {MOST_ROWS // 2} best and the {MOST_ROWS // 2} weakest of {len(adapted)} sites"
        if left_out > 0
        else "Each site"
    )
    key = f"○ zero-shot  ● adapted{'  ◆ the site’s own' if own else ''}"
    return Plot(
        "sites",
        "Accuracy at each site, %" if left_out <= 0 else f"{which}, %",
        f"{which}: accuracy zero-shot and adapted.",
        figure,
        key,
    )


def spread(story: Story) -> Plot | None:
    """A histogram of the sites by accuracy, if they are too many to be shown one by one."""
    after = [value for value in story.adapted["sites"].values() if value is not None]
    before = [value for value in story.zero["sites"].values() if value is not None]
    if not (before and after) or len(after) + len(story.adapted["holdout_sites"]) <= MOST_ROWS:
        return None
    figure, axes = canvas(300)
    low = min([*after, *before])
    edges = [low + (1 - low) * i / 20 for i in range(21)]
    axes.hist(before, edges, color=LIGHT["zero"], histtype="step", linewidth=1.8)
    axes.hist(after, edges, color=LIGHT["seen"], alpha=0.55)
    axes.grid(axis="y")
    axes.set_xlabel("test accuracy, %")
    percent(axes, "x")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    means = [sum(values) / len(values) for values in (before, after)]
    return Plot(
        "spread",
        "Sites by accuracy",
        f"Sites by accuracy; the mean is {100 * means[0]:.1f} % zero-shot and {100 * means[1]:.1f} % adapted.",
        figure,
        "▭ zero-shot  ■ adapted",
    )


def traffic(story: Story) -> Plot | None:
    """The bytes of the run compared with FedAVG, on a logarithmic scale."""
    each, whole = story.run.bytes_per_site_round, story.whole_bytes
    if not each or not story.run.done:
        return None
    many = story.run.done * max(story.sites, 1)
    ours = "LoRA" if story.settings.method == LORA else "adapter"
    rows = [
        ("a site and round", each, whole),
        ("a site, all rounds", each * story.run.done, whole and whole * story.run.done),
    ]
    if story.sites > 1:
        rows.append(("all sites and rounds", each * many, whole and whole * many))
    figure, axes = canvas(len(rows) * 62 + 46, left=24, right=22, bottom=34)
    axes.set_xscale("log")
    most = max(value for _, one, other in rows for value in (one, other) if value)
    low = each / 3
    axes.set_xlim(low, most * (most / low) ** 0.4)
    for place, (name, one, other) in enumerate(rows):
        y = -place
        write(axes, low, y + 0.42, name, "soft", va="center")
        for value, offset, role, what in ((one, 0.15, "seen", ours), (other, -0.17, "zero", "FedAVG")):
            if value:
                axes.barh([y + offset], [value - low], left=low, height=0.26, color=LIGHT[role])
                write(axes, value * 1.25, y + offset, f"{bytes_of(value)} {what if whole else ''}".strip(), va="center")
    axes.set_ylim(-len(rows) + 0.6, 0.62)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_of(value)))
    axes.minorticks_off()
    less = f", {whole / each:,.0f} times less than FedAVG of the whole model" if whole else ""
    return Plot(
        "bytes",
        "Bytes on the wire",
        f"{bytes_of(each)} a site and round, there and back{less}.",
        figure,
        "Logarithmic scale: each step is ten times as much." if whole else "",
    )


def phases(story: Story) -> Plot | None:
    """The time by phase."""
    seconds = story.seconds
    if "encode" not in seconds or seconds["total"] <= 0:
        return None
    waiting = max(0.0, seconds["total"] - seconds["encode"] - seconds["rounds"])
    parts = [
        ("opening data and model", seconds["encode"], "zero"),
        ("waiting for sites", waiting, "zero"),
        ("rounds", seconds["rounds"], "seen"),
    ]
    figure, axes = canvas(156, left=18, right=18, bottom=42)
    for place, (name, value, role) in enumerate(parts):
        axes.barh([-place], [value], height=0.36, color=LIGHT[role])
        write(axes, 0, -place + 0.36, f"{name}: {value:.1f} s, {100 * value / seconds['total']:.0f} %", va="center")
    axes.set_ylim(-2.3, 0.6)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("seconds")
    return Plot(
        "time",
        "Time by phase",
        f"{seconds['total']:.0f} seconds in all: " + "; ".join(f"{n} {v:.1f} s" for n, v, _ in parts) + ".",
        figure,
    )


def pace(story: Story) -> Plot | None:
    """The seconds of each round."""
    known = [(line["round"], line["seconds"]) for line in story.lines if line["round"]]
    if len(known) < 2:
        return None
    figure, axes = canvas(190)
    numbers, seconds = zip(*known, strict=True)
    if len(known) <= 60:
        axes.bar(numbers, seconds, color=LIGHT["seen"], width=0.7)
    else:
        axes.plot(numbers, seconds, color=LIGHT["seen"], linewidth=1.5)
    axes.set_ylim(0, 1.08 * max([*seconds, 0.1]))
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("round")
    return Plot(
        "pace", "Seconds of each round", f"Rounds took {min(seconds):.1f} to {max(seconds):.1f} seconds.", figure
    )
