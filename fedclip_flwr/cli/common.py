"""The command itself: its options, and how errors are told."""

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


class Commands(TyperGroup):
    """What a user can mend is told in its own words, with exit status 2; anything else in one line, with 1."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Takes `--debug` wherever it stands."""
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
            told = isinstance(error, UserError)
            hint = "" if ctx.params.get("debug") else f" ({DEBUG} shows where)"
            what = str(error) if told else f"fedclip failed: {one_line(f'{type(error).__name__}: {error}')}{hint}"
            typer.echo(what, err=True)
            raise typer.Exit(2 if told else 1) from None


class Command(TyperCommand):
    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace("\\[", "[")  # typer's own, for a markup that is not used


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
    debug: Annotated[bool, typer.Option(DEBUG, help="With an error, show where it was raised.")] = False,
) -> None:
    """One CLIP for the images of several sites, without moving one image."""


def option(text: str, *names: str, metavar: str | None = None) -> Any:
    """An option whose help says its default itself: typer would put a stray backslash before it."""
    return typer.Option(*names, help=text, show_default=False, metavar=metavar)
