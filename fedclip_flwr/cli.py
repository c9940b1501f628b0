"""The command `fedclip`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedclip_flwr import __version__
from fedclip_flwr.errors import UserError

app = typer.Typer(
    name="fedclip",
    help="One CLIP for the images of several sites, without moving one image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version.")
    ] = False,
) -> None:
    """One CLIP for the images of several sites, without moving one image."""


@app.command()
def run(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as adapter=gate or data=folder:images."),
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, help="How many sites to simulate.")] = 10,
) -> None:
    """Simulate a federation on this machine, from start to summary.

    It has a SuperLink of its own, started and stopped. The exit status is 0 only if the run was completed.

    fedclip run --nodes 4 data=folder:images num-server-rounds=50
    """
    from fedclip_flwr import simulation

    try:
        raise typer.Exit(simulation.run(nodes, settings or []))
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
