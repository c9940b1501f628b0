"""Commands that show runs, and what is stored in FEDCLIP_HOME."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedclip_flwr.cli.common import RESULTS_DIR, command, option


@command()
def runs(
    names: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", show_default=False)] = None,
    as_json: Annotated[bool, option("Print JSON, an object for each run; accuracies are fractions.", "--json")] = False,
    results_dir: Annotated[Path | None, option(RESULTS_DIR)] = None,
) -> None:
    """List all runs, the newest last; or show one run in full; or put several side by side.

    A run is the name of its folder, a path to it, or `latest`. Runs that were killed, or whose files are damaged, are
    marked as such.

    Examples: fedclip runs; fedclip runs latest; fedclip runs 20261126-140212 20261126-141530 --json
    """
    from fedclip_flwr.runs import runlist  # not for --help

    typer.echo(runlist.show(names or [], results_dir, as_json))


@command()
def watch(
    run: Annotated[str, typer.Argument(metavar="[RUN]", show_default=False)] = "latest",
    results_dir: Annotated[Path | None, option(RESULTS_DIR)] = None,
) -> None:
    """Follow a run on this machine while it is running: its rounds, the time left, and failed sites.

    It only reads the run's folder, so the run is not disturbed, and continues when you stop watching (Ctrl-C).
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
        option("The report's folder (default: the run's; for several runs one below FEDCLIP_HOME/reports)."),
    ] = None,
    results_dir: Annotated[Path | None, option(RESULTS_DIR)] = None,
) -> None:
    """Write the report of a run as one page, with its plots as files; or put several runs side by side on one.

    A run is the name of its folder, a path to it, or `latest` (the default). A completed run has its report already;
    it can be made again, and also made for a run that failed or is still running. Without the run's images, the report
    shows what was recorded about them at the end of the run.

    Examples: fedclip report; fedclip report runs/20261126-140212 --out report; fedclip report 20261126-140212 latest
    """
    from fedclip_flwr.report import writing  # not for --help: it brings torch and matplotlib

    if sys.stderr.isatty():
        typer.echo("Reading the run and drawing plots: some seconds…", err=True)
    typer.echo(writing.make(names or ["latest"], out, results_dir))


@command()
def audit(
    run: Annotated[str, typer.Argument(metavar="[RUN]", show_default=False)] = "latest",
    site: Annotated[
        list[str] | None, option("Only this site's images (default: those of all sites).", "--site", metavar="NAME")
    ] = None,
    data: Annotated[str, option("A real site's own images, as in its node config; with --site.")] = "",
    canaries: Annotated[
        int, option("Simulate the run again with N canaries in it, and attack those.", "--canaries", metavar="N")
    ] = 0,
    confidence: Annotated[float, option("How certain the lower bound is (default: 0.95).")] = 0.95,
    as_json: Annotated[bool, option("Print JSON.", "--json")] = False,
    results_dir: Annotated[Path | None, option(RESULTS_DIR)] = None,
) -> None:
    """Attack a run's result: which training images can be found by it, and the least ε that follows.

    Images that were trained on are compared with images of the same site and class that were not. The ε is a lower
    bound, beside the one that the run claims: a stronger attack may find more. A simulation's images are opened as its
    settings say; a real site names its own with --data and --site. Canaries are random features, or where dp hides
    sites whole sites, in a new simulation with the run's settings.

    Examples: fedclip audit; fedclip audit study --canaries 200; fedclip audit study --site north --data /images
    """
    from fedclip_flwr.experiments import audit  # not for --help: it brings torch

    options = audit.AuditOptions(run, site or [], data, results_dir, canaries, confidence, as_json)
    typer.echo(audit.audit(options, (lambda text: typer.echo(text, err=True)) if sys.stderr.isatty() else None))


@command()
def forget(
    run: Annotated[str, typer.Argument(metavar="RUN", show_default=False)],
    site: Annotated[str, option("The site whose images are to be forgotten.", "--site", metavar="NAME")],
    earlier: Annotated[
        bool, option("Only what it gave before the newest version: images that it has deleted since.", "--earlier")
    ] = False,
    results_dir: Annotated[Path | None, option(RESULTS_DIR)] = None,
) -> None:
    """Take what a site has given out of a result of one round, exactly, in all versions.

    A run with method=one-round is a sum over its sites. Afterwards each version is the result of a federation without
    that site, to the bit, and no file of the run has anything of it. This can't be undone. Sites need not be connected.
    For single images: their site deletes them, `fedclip update RUN` replaces its sums, and `fedclip forget --earlier`
    takes the old ones out of the versions before. Adapters that were trained in rounds can't forget.

    Examples: fedclip forget study --site north; fedclip forget study.3 --site north --earlier
    """
    from fedclip_flwr.operations import forget  # not for --help: it brings torch

    typer.echo(forget.forget(run, site, results_dir, earlier, typer.echo))


@command()
def clean(
    kinds: Annotated[list[str] | None, typer.Argument(metavar="[KIND]...", show_default=False)] = None,
    older_than: Annotated[
        int | None, option("Only what has not been used for DAYS days.", "--older-than", metavar="DAYS")
    ] = None,
    yes: Annotated[bool, option("Remove without asking.", "--yes", "-y")] = False,
) -> None:
    """Show what is stored in FEDCLIP_HOME and can be made again, and remove what you choose.

    A KIND is features, contents, partitions, exchange, sweeps, personal, or given. The last two, the sites' personal
    adapters and the sums that sites gave under masks, can't be made again and are removed only if they are named.
    Without the sums, those sites can't take part in an update of the run, nor leave it. Runs, reports, tables, data and
    keys are never removed, nor is anything that another process is using. You are asked about each kind; without a
    terminal nothing is removed unless --yes is given.

    Examples: fedclip clean; fedclip clean features --older-than 30 --yes
    """
    from fedclip_flwr.operations import clean  # not for --help

    ask = (lambda _: True) if yes else typer.confirm if sys.stdin.isatty() else None
    clean.clean(kinds or [], older_than, ask, typer.echo)
