"""A page with several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedclip_flwr.base import Settings, UserError, content, files
from fedclip_flwr.base.text import percent
from fedclip_flwr.report import compare_plots
from fedclip_flwr.report.drawing import styled
from fedclip_flwr.report.markup import aside, e, gain, page, plots, section, setting, table
from fedclip_flwr.report.output import check_out, write_plots, write_text
from fedclip_flwr.report.story import Story
from fedclip_flwr.runs import Run
from fedclip_flwr.runs.history import PAGE, WHERE


def write(runs: Sequence[Run], out: Path | None) -> str:
    """Writes the page into its folder. Returns the lines for the terminal."""
    stories = [Story(run) for run in runs]
    names = named(runs)
    folder = out.expanduser().absolute() if out else files.home() / "reports" / content.file_name("_".join(names))
    check_out(folder)
    with styled():
        figures = write_plots(compare_plots.of_runs(dict(zip(names, stories, strict=True))), folder)
    parts = [
        f'<header>\n<p class="eyebrow">fedclip report</p>\n<h1>{len(runs)} runs compared</h1>\n'
        f'<p class="sentence">{e(", ".join(names))}</p>\n</header>',
        section("accuracy", "Accuracy", plots(figures, "seen", "unseen", "runs-seen", "runs-unseen")),
        section("table", "All figures", _figures(names, stories)),
        section("settings", "What differs", _settings(names, stories)),
        section("cost", "Bytes and time", plots(figures, "runs-bytes", "runs-time")),
    ]
    path = write_text(folder / PAGE, page(f"{len(runs)} runs – fedclip report", parts))
    return "\n".join([*(story.figures for story in stories), f"Report: {path}"])


def named(runs: Sequence[Run]) -> list[str]:
    """The runs' names, or their paths if two names are equal. Raises if a run is given twice."""
    if len({run.path for run in runs}) < len(runs):
        raise UserError("the same run is given twice; give each once")
    names = [run.name for run in runs]
    return names if len({*names}) == len(names) else [str(run.path) for run in runs]


HEAD = [
    "run",
    "status",
    "rounds",
    "sites",
    "seen, %",
    "gain",
    "unseen, %",
    "gain",
    "own, %",
    "bytes",
    "times less",
    "seconds",
    "ε",
]


def row(name: str, story: Story) -> list[str]:
    """The row of a run in the table."""
    zero, adapted = story.zero, story.adapted
    own = ((adapted.get("personal_metrics") or {}).get("seen") or {}).get("accuracy")
    less = f"{story.times_less:,.0f}" if story.times_less else "–"
    return [
        name,
        story.run.status,
        str(story.run.done),
        str(story.sites),
        *(text for key in ("seen", "unseen") for text in (percent(adapted[key]), gain(zero[key], adapted[key]))),
        percent(own),
        story.cost,
        less,
        f"{story.seconds['total']:.0f}",
        "–" if story.run.epsilon is None else f"{story.run.epsilon:.2f}",
    ]


def _figures(names: Sequence[str], stories: Sequence[Story]) -> str:
    """The table of all figures that are known of any run."""
    columns = [column for column in zip(HEAD, *map(row, names, stories), strict=True) if {*column[1:]} != {"–"}]
    head, *rows = zip(*columns, strict=True)
    return table(head, rows, words=2)


def _settings(names: Sequence[str], stories: Sequence[Story]) -> str:
    """The settings in which the runs differ."""

    def shown(story: Story, key: str) -> str:
        return str(story.sites) if key == "sites" else setting(story.run.settings.get(key, "–")) or "–"

    keys = [*(key for key in Settings.keys() if key not in WHERE), "sites"]  # noqa: SIM118
    different = [key for key in keys if len({shown(story, key) for story in stories}) > 1]
    packages = {str(story.run.settings.get("package")) for story in stories}
    note = aside("They were made with different versions of this package.") if len(packages) > 1 else ""
    if not different:
        return aside("The settings are the same.") + note
    rows = [[name, *(shown(story, key) for key in different)] for name, story in zip(names, stories, strict=True)]
    return table(["run", *different], rows, words=len(different) + 1) + note
