"""The command itself: its global options, and how errors are shown."""

from __future__ import annotations

import traceback
from functools import partial
from typing import Annotated, Any

import click
import typer
from typer.core import TyperCommand, TyperGroup

from fedclip_flwr.base import UserError, __version__
from fedclip_flwr.base.errors import one_line

DEBUG = "--debug"
RESULTS_DIR = "The folder of run folders, as the setting results-dir (default: FEDCLIP_HOME/runs)."
"""The help of an option."""


class Commands(TyperGroup):
    """Shows a `UserError` as its own message, exit status 2; any other error as one line, exit status 1."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Accepts `--debug` at any position."""
        if DEBUG in args:
            args = [DEBUG, *(arg for arg in args if arg != DEBUG)]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("\nStopped.", err=True)
            raise typer.Exit(130) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            known = isinstance(error, UserError)
            hint = "" if ctx.params.get("debug") else f" ({DEBUG} shows where)"
            text = str(error) if known else f"fedclip failed: {one_line(f'{type(error).__name__}: {error}')}{hint}"
            typer.echo(text, err=True)
            raise typer.Exit(2 if known else 1) from None


class Command(TyperCommand):
    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace("\\[", "[")  # typer escapes brackets, for a markup that is not used


app = typer.Typer(
    name="fedclip",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


command = partial(app.command, cls=Command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="If an error occurs, show its traceback.")] = False,
) -> None:
    """One CLIP for the images of several sites, without moving one image."""


def option(text: str, *names: str, metavar: str | None = None) -> Any:
    """An option whose help text contains its default: typer would add a stray backslash to it."""
    return typer.Option(*names, help=text, show_default=False, metavar=metavar)
