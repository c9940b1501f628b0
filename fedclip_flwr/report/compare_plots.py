"""The plots that compare runs: each run has its own colour and line pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedclip_flwr.base.text import bytes_of
from fedclip_flwr.report.drawing import Plot, canvas, name_ends, room_for, short, write
from fedclip_flwr.report.plots import ROW, dumbbells, percent
from fedclip_flwr.report.story import Story
from fedclip_flwr.report.theme import LIGHT

ROLES = ("seen", "unseen", "own", "zero")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
Stories = Mapping[str, Story]


def of_runs(stories: Stories) -> list[Plot]:
    """All plots for which there are data."""
    made = [
        *(over_rounds(stories, key) for key in ("seen", "unseen")),
        *(reached(stories, key) for key in ("seen", "unseen")),
        bars(
            stories, "runs-bytes", "Bytes of a site and round", lambda story: story.run.bytes_per_site_round, bytes_of
        ),
        bars(
            stories, "runs-time", "Seconds in all", lambda story: story.seconds["total"], lambda value: f"{value:.1f} s"
        ),
    ]
    return [plot for plot in made if plot]


def over_rounds(stories: Stories, key: str) -> Plot | None:
    """The accuracy of each run over its rounds."""
    lines = {
        name: [(line["round"], line[key]) for line in story.lines if line.get(key) is not None]
        for name, story in stories.items()
    }
    known = {name: line for name, line in lines.items() if line}
    if not known:
        return None
    names = [short(name, 16) for name in known]
    figure, axes = canvas(300, right=room_for(names) + 30)
    axes.grid(axis="y")
    styles = {name: (ROLES[n % 4], DASHES[n // 4 % 4]) for n, name in enumerate(lines)}
    for name, line in known.items():
        role, dashes = styles[name]
        axes.plot(
            *zip(*line, strict=True), color=LIGHT[role], dashes=dashes, linewidth=1.8, marker="" if line[1:] else "o"
        )
    axes.set_xlim(0, max(1, *(line[-1][0] for line in known.values())))
    ends = [
        (line[-1][1], f"{text} {100 * line[-1][1]:.1f}", styles[name][0])
        for (name, line), text in zip(known.items(), names, strict=True)
    ]
    name_ends(axes, ends, 14, 11)
    percent(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("round")
    says = "; ".join(f"{name} {100 * line[-1][1]:.1f} %" for name, line in known.items())
    return Plot(
        key, f"{key.capitalize()} accuracy over rounds, %", f"{key.capitalize()} accuracy at the end: {says}.", figure
    )


def reached(stories: Stories, key: str) -> Plot | None:
    """The accuracy of each run, zero-shot and adapted."""
    rows = [(short(name), story.zero[key], story.adapted[key], None) for name, story in stories.items()]
    if all(adapted is None for _, _, adapted, _ in rows):
        return None
    figure, _ = dumbbells(rows, [key] * len(rows), "accuracy, %")
    says = f"{key.capitalize()} accuracy zero-shot and of the selected round, of {len(rows)} runs."
    return Plot(f"runs-{key}", f"{key.capitalize()}: zero-shot and adapted, %", says, figure, "○ zero-shot  ● adapted")


def bars(
    stories: Stories, name: str, heading: str, of: Callable[[Story], float | None], text: Callable[[float], str]
) -> Plot | None:
    """One figure of each run, as bars."""
    known = {run: value for run, story in stories.items() if (value := of(story))}
    if not known:
        return None
    labels = [short(run) for run in known]
    figure, axes = canvas(len(known) * ROW + 42, left=room_for(labels), bottom=30)
    places = range(len(known) - 1, -1, -1)
    axes.barh(places, [*known.values()], height=0.5, color=LIGHT["seen"])
    for place, value in zip(places, known.values(), strict=True):
        write(axes, value + 0.015 * max(known.values()), place, text(value), va="center")
    axes.set_yticks(places, labels)
    axes.set_xlim(0, 1.3 * max(known.values()))
    axes.set_ylim(-0.7, len(known) - 0.3)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    says = "; ".join(f"{run} {text(value)}" for run, value in known.items())
    return Plot(name, heading, f"{heading}: {says}.", figure)
