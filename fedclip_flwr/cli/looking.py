"""Commands that look at runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedclip_flwr.cli.common import app, option

RESULTS_DIR = "Where run folders are, as the setting results-dir; FEDCLIP_HOME/runs unless said."


@app.command()
def report(
    names: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", show_default=False)] = None,
    out: Annotated[Path | None, option("The report's folder; that of the run unless said.")] = None,
    results_dir: Annotated[Path | None, option(RESULTS_DIR)] = None,
) -> None:
    """Write the report of a run as one page, with its plots as files; or put several runs side by side on one.

    A run is the name of its folder, a path to it, or `latest`, which is taken unless said. A completed run has its
    report already; it can be made again, and made of a run that failed or is still under way. Without the run's images,
    what was found in them at its end is told.

    Examples: fedclip report; fedclip report runs/20261126-140212 --out report; fedclip report 20261126-140212 latest
    """
    from fedclip_flwr import report  # not for --help: it brings torch and matplotlib

    if sys.stderr.isatty():
        typer.echo("Looking at what is there, and drawing: some seconds…", err=True)
    typer.echo(report.make(names or ["latest"], out, results_dir))
