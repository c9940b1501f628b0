"""Commands that look at runs, and at what is kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedclip_flwr.cli.common import command, option

RESULTS_DIR = "Where run folders are, as the setting results-dir; FEDCLIP_HOME/runs unless said."


@command()
def runs(
    names: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", show_default=False)] = None,
    as_json: Annotated[
        bool, option("The same as JSON, an object for each run; accuracies are shares.", "--json")
    ] = False,
    results_dir: Annotated[Path | None, option(RESULTS_DIR)] = None,
) -> None:
    """List the runs there are, the newest last; or tell all of one run; or put several side by side.

    A run is the name of its folder, a path to it, or `latest`. One that was killed, or whose files are damaged, is told
    as such.

    Examples: fedclip runs; fedclip runs latest; fedclip runs 20261126-140212 20261126-141530 --json
    """
    from fedclip_flwr.runs import runlist  # not for --help

    typer.echo(runlist.show(names or [], results_dir, as_json))


@command()
def watch(
    run: Annotated[str, typer.Argument(metavar="[RUN]", show_default=False)] = "latest",
    results_dir: Annotated[Path | None, option(RESULTS_DIR)] = None,
) -> None:
    """Follow a run of this machine while it goes on: its rounds, the time left, and who was left out.

    It reads the run's folder and asks nobody, so the run is not disturbed, and goes on when the watching ends (Ctrl-C).
    Without a terminal it prints a line for each new round. The exit status is 0 if the run was completed, 1 if it
    failed, was stopped or killed, 130 after Ctrl-C.

    Examples: fedclip watch; fedclip watch 20261126-140212 --results-dir /data/runs
    """
    from fedclip_flwr.runs import watch  # not for --help

    raise typer.Exit(watch.watch(run, results_dir))


@command()
def report(
    names: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", show_default=False)] = None,
    out: Annotated[
        Path | None,
        option("The report's folder; that of the run unless said, of several runs one below FEDCLIP_HOME/reports."),
    ] = None,
    results_dir: Annotated[Path | None, option(RESULTS_DIR)] = None,
) -> None:
    """Write the report of a run as one page, with its plots as files; or put several runs side by side on one.

    A run is the name of its folder, a path to it, or `latest`, which is taken unless said. A completed run has its
    report already; it can be made again, and made of a run that failed or is still under way. Without the run's images,
    what was found in them at its end is told.

    Examples: fedclip report; fedclip report runs/20261126-140212 --out report; fedclip report 20261126-140212 latest
    """
    from fedclip_flwr.report import writing  # not for --help: it brings torch and matplotlib

    if sys.stderr.isatty():
        typer.echo("Looking at what is there, and drawing: some seconds…", err=True)
    typer.echo(writing.make(names or ["latest"], out, results_dir))


@command()
def clean(
    kinds: Annotated[list[str] | None, typer.Argument(metavar="[KIND]...", show_default=False)] = None,
    older_than: Annotated[
        int | None, option("Only what was not used for so many days.", "--older-than", metavar="DAYS")
    ] = None,
    yes: Annotated[bool, option("Remove it without a question.", "--yes", "-y")] = False,
) -> None:
    """Show what is kept in FEDCLIP_HOME and can be made again, and remove what you choose.

    A KIND is features, contents, partitions, exchange, sweeps, or personal. The last one, the adapters that sites have
    made their own, can't be made again and is removed only when it is named. Runs, reports, tables, data and keys are
    never removed, nor what another process is using. You are asked about each kind; without a terminal nothing is
    removed unless --yes is given.

    Examples: fedclip clean; fedclip clean features --older-than 30 --yes
    """
    from fedclip_flwr.operations import clean  # not for --help

    ask = (lambda _: True) if yes else typer.confirm if sys.stdin.isatty() else None
    clean.clean(kinds or [], older_than, ask, typer.echo)
