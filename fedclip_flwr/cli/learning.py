"""Commands that learn: from images to an adapter, and to a table that compares methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import meaning_of
from fedclip_flwr.cli.common import command, option


def _settings() -> str:
    """The settings with their defaults and meanings, for the help."""
    lines = ["Settings and their defaults:"]
    for key, field in Settings.keys().items():
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        lines.append(f"  {key}={default}: {meaning_of(field)}")
    return "\b\n" + "\n".join(lines)


@command(epilog=_settings())
def run(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", "-n", metavar="N", help="How many sites: 10 unless said.", show_default=False),
    ] = None,
    on: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="No simulation: a running SuperLink by its name in Flower's configuration, with its sites.",
            show_default=False,
        ),
    ] = "",
    name: Annotated[str, option("A name for the run and its folder, as the setting name.")] = "",
) -> None:
    """Simulate a federation on this machine, from its plan to its summary; or run one with real sites.

    A simulation has a SuperLink of its own, started and stopped. The exit status is 0 only if the run was completed: 1
    if it failed, 2 if the settings can't be used. Paths may be relative; those of a SuperLink's machine must not.

    A run that was interrupted goes on after its last complete round, with its own settings and as many sites: fedclip
    run resume=latest, or the name of its folder.

    Examples: fedclip run --nodes 4 data=folder:images num-server-rounds=50; fedclip run --on hospitals min-sites=3
    """
    from fedclip_flwr.operations import simulation  # not for --help: it brings torch

    if on and nodes is not None:
        raise UserError(f"--nodes {nodes}: the SuperLink {on} has its own sites; leave it out")
    given = [*(settings or []), *([f"name={name}"] if name else [])]
    code = simulation.run_on(on, given) if on else simulation.run(nodes, given)
    raise typer.Exit(code)


@command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
) -> None:
    """Lay a Flower app of your own into a folder, where `fedclip run` and `flwr run .` find it.

    It is this package's two apps, and a pyproject.toml with every setting, what it means, and its value: the default or
    the one given, which is then that of every run from there. Nothing is overwritten. Real sites take this app as they
    take the installed one.

    Example: fedclip init study data=folder:images num-server-rounds=50; cd study; fedclip run --nodes 4
    """
    from fedclip_flwr.operations import scaffold  # not for --help

    typer.echo(scaffold.init(folder, settings or []))


@command()
def encode(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    out: Annotated[
        str, option("The feature folder; without it the features are only stored, for runs on this machine.")
    ] = "",
) -> None:
    """Encode a data set ahead of time, and write its features as a folder that data=features:PATH takes.

    Settings are data, model, model-revision, prompt, class-names, precision, device, and those of columns; `fedclip run
    --help` tells of them. What was interrupted goes on when the same command is given again.

    Example: fedclip encode data=folder:images model=openai/clip-vit-base-patch32 --out features
    """
    from fedclip_flwr.inference import encode
    from fedclip_flwr.operations import simulation  # not for --help: they bring torch

    simulation.stop_in_order("Stopped. What is encoded is kept: the same command goes on from here.")
    typer.echo(encode.encode(settings or [], out))


@command()
def sweep(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    data: Annotated[
        str, option("As the setting data: pacs, folder:PATH, features:PATH…; drawn unless said.")
    ] = "drawn",
    model: Annotated[str, option("As the setting model; bundled unless said.")] = "bundled",
    methods: Annotated[
        str,
        option(
            "With commas: zero-shot, local, fedavg, fedprox, paper, attention, gate, scale, blend, centralised; all "
            "unless said."
        ),
    ] = "",
    holdouts: Annotated[
        str, option("Domains to hold out in turn, with commas, or several at once with +; every one unless said.")
    ] = "",
    nodes: Annotated[int, option("How many sites; one for each seen domain unless said.", "--nodes", "-n")] = 0,
    seeds: Annotated[
        int, option("How many seeds, each with other splits and other random weights; 3 unless said.")
    ] = 3,
    first_seed: Annotated[int, option("The first of them; 0 unless said.")] = 0,
    rounds: Annotated[int, option("Rounds; 20 unless said.")] = 20,
    full_model_rounds: Annotated[int, option("Rounds where the whole model is trained; 5 unless said.")] = 5,
    full_model_seeds: Annotated[int, option("How many of the seeds then; 1 unless said.")] = 1,
    jobs: Annotated[int, option("Processes; as many as there are cores unless said, or 1 with a GPU.")] = 0,
    out: Annotated[str, option("The folder of the results; one below FEDCLIP_HOME/sweeps unless said.")] = "",
    name: Annotated[str, option("A name for the sweep, and for its folder below FEDCLIP_HOME/sweeps.")] = "",
    against: Annotated[
        str, option("The method whose differences from all others are told, beside zero-shot; paper unless said.")
    ] = "",
) -> None:
    """Compare methods: every one on every held-out domain, with several seeds, in one table.

    Results are kept: a sweep that was stopped goes on when the same command is given again, and a larger one takes over
    what is there. Settings that are the same for all methods can be given too, such as partition=iid or local-epochs=2;
    `fedclip run --help` lists them. The exit status is 0 only if the table is complete.

    The folder of the results has the tables (table.md; accuracy.md and accuracy.tex with one metric in each cell), the
    figures of each site with each seed (results.csv), differences with intervals and tests (differences.csv), plots.

    Examples: fedclip sweep --data pacs --model openai/clip-vit-base-patch32; fedclip sweep --data features:PATH --seeds
    10 --methods paper,gate
    """
    options = dict(locals())  # named as the fields of SweepOptions
    from fedclip_flwr.experiments import comparison  # not for --help: these bring torch
    from fedclip_flwr.operations import simulation

    simulation.stop_in_order("Stopped. The results so far are kept: the same command goes on from here.")
    typer.echo(comparison.compare(comparison.SweepOptions(**{**options, "settings": settings or []})))
