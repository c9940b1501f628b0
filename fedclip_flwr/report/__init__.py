"""The report of a run: one page that needs nothing else, its plots as files, and what it knows of held-out images.

    report.html     the page
    plots/          each plot as SVG and as PNG
    held_out.json   the analysis of what the server holds out, for reports that are made where the data isn't

All follow from the run alone: made again, they are the same to the byte.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclip_flwr import content, data, history
from fedclip_flwr.errors import UserError, one_line
from fedclip_flwr.history import Run

if TYPE_CHECKING:
    from fedclip_flwr.features import Features
    from fedclip_flwr.report.drawing import Plot
    from fedclip_flwr.report.story import Story

os.environ.setdefault("MPLCONFIGDIR", str(content.home() / "matplotlib"))  # a server's user may have no home
PAGE, PLOTS, FILE = "report.html", "plots", "held_out.json"
MARK = b"fedclip report</title>"
"""By which a page is known for one of ours."""
Opened = tuple["Features", str | None]


def at_end(folder: Path, features: Features, holdout: str | None) -> str:
    """Writes the report of a run that has just ended; the line that tells where it is, or why there is none."""
    try:
        return f"Report: {write(history.read(folder), opened=(features, holdout))}"
    except Exception as error:  # the run is complete, whatever becomes of its report
        return f"no report: {one_line(error)}"


def write(run: Run, out: Path | None = None, opened: Opened | None = None) -> Path:
    """Writes the report of a run into its folder, or to `out`; where the page is.

    `opened` are the run's features and its held-out domain, where they are at hand.
    """
    from fedclip_flwr.report import heldout_plots, page, plots
    from fedclip_flwr.report.drawing import styled
    from fedclip_flwr.report.story import Story

    folder = out or run.path
    check_out(folder, run)
    story = Story(run)
    found, lacking = held_out(story, folder, opened)
    story = replace(story, domain=found["domain"] if found else None)
    with styled():
        made = [*plots.of_run(story), *(heldout_plots.of_held_out(found) if found else [])]
        figures = write_plots(made, folder)
    return write_text(folder / PAGE, page.of_run(story, figures, found, lacking))


def held_out(story: Story, folder: Path, opened: Opened | None) -> tuple[dict[str, Any] | None, str]:
    """The analysis of held-out images, made or as it was kept; and a sentence on what is lacking, if anything is."""
    from fedclip_flwr.report import heldout

    try:
        if story.selected is None and not (story.run.path / "model").is_dir():
            raise UserError("the run came to no round")
        features, holdout = opened or heldout.open_held_out(story.settings)
        if not data.held_out(holdout, features.domains):
            raise UserError("the server of this run holds no held-out images itself")
        found = heldout.analyse(story.run.path, story.settings, features, holdout or "")
    except Exception as error:  # what else there is to tell is told all the same
        if not (story.run.path / FILE).exists():
            return None, one_line(error)
        return heldout.kept(story.run.path, one_line(error))
    write_text(folder / FILE, heldout.as_text(found))
    return found, ""


def check_out(folder: Path, *own: Run) -> None:
    """Raises where something else is: another run, whose report would be lost, or what is no report."""
    if not folder.is_dir() or folder.resolve() in [run.path.resolve() for run in own]:
        return
    if (folder / history.SETTINGS).exists():
        raise UserError(f"--out {folder}: a run is there, whose own report would be lost; name another folder")
    others = [name for name in sorted(os.listdir(folder)) if name not in (PAGE, PLOTS, FILE) and name[0] != "."]
    if (folder / PAGE).exists() and not ((folder / PAGE).is_file() and MARK in (folder / PAGE).read_bytes()):
        others.insert(0, PAGE)
    if others:
        raise UserError(f"--out {folder}: something else is there, such as {others[0]}; name another folder")


def write_plots(made: list[Plot], folder: Path) -> dict[str, tuple[Plot, str]]:
    """Writes each plot as SVG and PNG; by name the plots with their SVG for the page."""
    from fedclip_flwr.report import drawing

    figures = {}
    for plot in made:
        svg, png = drawing.as_svg(plot), drawing.as_png(plot)
        write_text(folder / PLOTS / f"{plot.name}.svg", svg)
        content.write_whole(folder / PLOTS / f"{plot.name}.png", partial(_write_bytes, png), "--out")
        figures[plot.name] = plot, drawing.inline(svg, plot.name, plot.says)
    return figures


def write_text(path: Path, text: str) -> Path:
    content.write_whole(path, lambda part: part.write_text(text, encoding="utf-8"), "--out")
    return path


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def make(names: list[str], out: Path | None = None, root: Path | None = None) -> str:
    """Writes the report of a run, or the comparison of several; what there is to say of it."""
    if out is not None and not str(out).strip("."):
        raise UserError("--out: name the folder that is to be written")
    runs = [history.find(name, root) for name in names]
    if len(runs) > 1:
        from fedclip_flwr.report import compare

        return compare.write(runs, out)
    from fedclip_flwr.report.story import Story

    path = write(runs[0], out and out.expanduser().absolute())
    return f"{Story(runs[0]).figures}\nReport: {path}"
