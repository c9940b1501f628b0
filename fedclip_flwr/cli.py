"""The command `fedclip`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedclip_flwr import __version__
from fedclip_flwr.config import Settings
from fedclip_flwr.errors import UserError

app = typer.Typer(
    name="fedclip",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """One CLIP for the images of several sites, without moving one image."""


def _settings() -> str:
    """The settings with their defaults and meanings, for the help."""
    works, planned = [], []
    for key, field in Settings.keys().items():
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        if field.metadata.get("planned"):
            planned.append(f"{key}={default}")
        else:
            choices = field.metadata.get("choices")
            works.append(
                f"  {key}={default}: {field.metadata['meaning']}" + (f" ({', '.join(choices)})" if choices else "")
            )
    later = "Planned, the default only so far: " + ", ".join(planned)
    return "\b\n" + "\n".join(["Settings and their defaults:", *works]) + f"\n\n{later}"


@app.command(epilog=_settings())
def run(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    nodes: Annotated[
        int,
        typer.Option("--nodes", "-n", metavar="N", help="How many sites: 10 unless said.", show_default=False),
    ] = 10,
) -> None:
    """Simulate a federation on this machine, from its plan to its summary.

    It has a SuperLink of its own, started and stopped. The exit status is 0 only if the run was completed: 1 if it
    failed, 2 if the settings can't be used. Paths may be relative.

    Example: fedclip run --nodes 4 data=folder:images num-server-rounds=50
    """
    from fedclip_flwr import simulation  # not for --help: it brings torch

    try:
        code = simulation.run(nodes, settings or [])
    except UserError as error:
        typer.echo(str(error), err=True)
        code = 2
    raise typer.Exit(code)
