"""The report of a run: a self-contained page, its plots as files, and the analysis of held-out images.

All depend on the run alone: made again, they have the same bytes.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclip_flwr.base import UserError, files
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.data import held_out as held_out_of
from fedclip_flwr.report.output import FILE, check_out, write_file, write_plots
from fedclip_flwr.runs import Run, history
from fedclip_flwr.runs.history import PAGE

if TYPE_CHECKING:
    from fedclip_flwr.features import Features
    from fedclip_flwr.report.story import Story


os.environ.setdefault("MPLCONFIGDIR", str(files.home() / "matplotlib"))  # a server's user may have no home
Opened = tuple["Features", str | None]


def at_end(folder: Path, features: Features, holdout: str | None) -> str:
    """Writes the report of a run that has just ended. Returns a line on where it is, or why there is none."""
    try:
        return f"Report: {write(history.read(folder), opened=(features, holdout))}"
    except Exception as error:  # the run is complete, even if its report fails
        return f"no report: {one_line(error)}"


def write(run: Run, out: Path | None = None, opened: Opened | None = None) -> Path:
    """Writes the report of a run into its folder, or to `out`. Returns the page's path.

    `opened` are the run's features and its held-out domain, if they are open already.
    """
    from fedclip_flwr.report import heldout_plots, page, plots
    from fedclip_flwr.report.drawing import styled
    from fedclip_flwr.report.story import Story

    folder = out or run.path
    check_out(folder, run)
    story = Story(run)
    found, problem = held_out(story, folder, opened)
    story = replace(story, domain=found["domain"] if found else None)
    with styled():
        made = [*plots.of_run(story), *(heldout_plots.of_held_out(found) if found else [])]
        figures = write_plots(made, folder)
    return write_file(folder / PAGE, page.of_run(story, figures, found, problem))


def held_out(story: Story, folder: Path, opened: Opened | None) -> tuple[dict[str, Any] | None, str]:
    """The analysis of held-out images, new or stored, and a sentence on why it is missing or not new."""
    from fedclip_flwr.report import heldout

    try:
        if story.run.selected is None and not (story.run.path / "model").is_dir():
            raise UserError("the run completed no round")
        features, holdout = opened or heldout.open_held_out(story.settings)
        if not held_out_of(holdout, features.domains):
            raise UserError("the server of this run holds no held-out images itself")
        found = heldout.analyse(story.run.path, story.settings, features, holdout or "")
    except Exception as error:  # the rest of the report does not need it
        if not (story.run.path / FILE).exists():
            return None, one_line(error)
        return heldout.kept(story.run.path, one_line(error))
    write_file(folder / FILE, heldout.as_text(found))
    return found, ""


def make(names: list[str], out: Path | None = None, root: Path | None = None) -> str:
    """Writes the report of a run, or the comparison of several. Returns the lines for the terminal."""
    if out is not None and not str(out).strip("."):
        raise UserError("--out: name the folder that is to be written")
    runs = [history.find(name, root) for name in names]
    if len(runs) > 1:
        from fedclip_flwr.report import compare

        return compare.write(runs, out)
    from fedclip_flwr.report.story import Story

    path = write(runs[0], out and out.expanduser().absolute())
    return f"{Story(runs[0]).figures}\nReport: {path}"
