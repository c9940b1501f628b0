"""A page with several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedclip_flwr.base import Settings, UserError, content, files
from fedclip_flwr.base.text import percent
from fedclip_flwr.report import compare_plots
from fedclip_flwr.report.drawing import styled
from fedclip_flwr.report.output import Figures, check_out, write_file, write_plots
from fedclip_flwr.report.rendering import gain, render, setting
from fedclip_flwr.report.story import Story
from fedclip_flwr.runs import Run
from fedclip_flwr.runs.history import PAGE, WHERE

HEAD = (
    *("run", "status", "rounds", "sites", "seen, %", "gain", "unseen, %", "gain", "own, %"),
    *("bytes", "times less", "seconds", "ε"),
)


def write(runs: Sequence[Run], out: Path | None) -> str:
    """Writes the page into its folder. Returns the lines for the terminal."""
    stories = named(runs)
    folder = out.expanduser().absolute() if out else files.home() / "reports" / content.file_name("_".join(stories))
    check_out(folder)
    with styled():
        figures = write_plots(compare_plots.of_runs(stories), folder)
    path = write_file(folder / PAGE, page(stories, figures))
    return "\n".join([*(story.figures for story in stories.values()), f"Report: {path}"])


def named(runs: Sequence[Run]) -> dict[str, Story]:
    """The runs by name, or by path if two names are equal. Raises if a run is given twice."""
    if len({run.path for run in runs}) < len(runs):
        raise UserError("the same run is given twice; give each once")
    unique = len({run.name for run in runs}) == len(runs)
    return {run.name if unique else str(run.path): Story(run) for run in runs}


def page(stories: Mapping[str, Story], figures: Figures) -> str:
    """The page: plots, all figures that are known of any run, and the settings in which the runs differ."""
    rows = [row(name, story) for name, story in stories.items()]
    columns = [column for column in zip(HEAD, *rows, strict=True) if {*column[1:]} != {"–"}]
    packages = {str(story.run.settings.get("package")) for story in stories.values()}
    return render(
        "compare.html",
        names=[*stories],
        figures=figures,
        figures_table=[*zip(*columns, strict=True)],
        settings=different(stories),
        same_package=len(packages) == 1,
    )


def row(name: str, story: Story) -> list[str]:
    """The row of a run in the table."""
    zero, adapted = story.zero, story.adapted
    return [
        name,
        story.run.status,
        str(story.run.done),
        str(story.sites),
        *(text for key in ("seen", "unseen") for text in (percent(adapted[key]), gain(zero[key], adapted[key]))),
        percent(story.own.get("accuracy")),
        story.cost,
        f"{story.times_less:,.0f}" if story.times_less else "–",
        f"{story.seconds['total']:.0f}",
        "–" if story.run.epsilon is None else f"{story.run.epsilon:.2f} ({story.run.unit})",
    ]


def different(stories: Mapping[str, Story]) -> list[tuple[str, ...]]:
    """The settings in which the runs differ, as a table with its head."""
    columns = [("run", *stories)]
    for key in [*(key for key in Settings.keys() if key not in WHERE), "sites"]:  # noqa: SIM118
        given = [story.run.settings.get(key, "–") if key != "sites" else story.sites for story in stories.values()]
        shown = [setting(value) or "–" for value in given]
        columns += [(key, *shown)] if len({*shown}) > 1 else []
    return [*zip(*columns, strict=True)]
