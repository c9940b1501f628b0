"""Commands that train: from images to an adapter, and to a table that compares methods."""

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
        int | None, option("Number of simulated sites (default: 10).", "--nodes", "-n", metavar="N")
    ] = None,
    on: Annotated[
        str,
        option(
            "Run on a SuperLink, by its name in Flower's configuration, with its sites; no simulation.", metavar="NAME"
        ),
    ] = "",
    name: Annotated[str, option("Name of the run and its folder, as the setting name.")] = "",
) -> None:
    """Simulate a federation on this machine, from its plan to its summary; or run one with real sites.

    A simulation starts and stops its own SuperLink. The exit status is 0 if the run was completed, 1 if it failed, 2 if
    the settings are invalid. Paths may be relative, except those on a SuperLink's machine.

    An interrupted run resumes after its last complete round, with its own settings and number of sites: fedclip run
    resume=latest, or the name of its folder.

    Examples: fedclip run --nodes 4 data=folder:images num-server-rounds=50; fedclip run --on hospitals min-sites=3
    """
    from fedclip_flwr.operations import simulation  # not for --help: it brings torch

    if on and nodes is not None:
        raise UserError(f"--nodes {nodes}: the SuperLink {on} has its own sites; leave it out")
    given = [*(settings or []), *([f"name={name}"] if name else [])]
    code = simulation.run_on(on, given) if on else simulation.run(nodes, given)
    raise typer.Exit(code)


@command()
def update(
    name: Annotated[str, typer.Argument(metavar="RUN", show_default=False)],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    nodes: Annotated[
        int | None, option("Number of simulated sites (default: as in the run).", "--nodes", "-n", metavar="N")
    ] = None,
    on: Annotated[
        str, option("Update on a SuperLink, by its name in Flower's configuration, with its sites.", metavar="NAME")
    ] = "",
) -> None:
    """Update a result of one round: only sites whose images are new or have changed are asked for their sums.

    A run with method=one-round is a sum over its sites. A site that comes later, or has other images, is added with
    one message; the sums of the others stay, whether they are connected or not. New classes are named by class-names.
    The result is the next version, a run of its own (RUN.2, RUN.3, …), with the settings of RUN. Every version can be
    used and compared, and updated again: to go back, update an earlier one. If nothing is new, there is no new version.

    Examples: fedclip update latest; fedclip update study --on hospitals; fedclip update study class-names=classes.txt
    """
    from fedclip_flwr.operations import simulation  # not for --help: it brings torch

    if on and nodes is not None:
        raise UserError(f"--nodes {nodes}: the SuperLink {on} has its own sites; leave it out")
    raise typer.Exit(simulation.update(on, nodes, [f"update={name}", *(settings or [])]))


@command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
) -> None:
    """Create your own Flower app in a folder, where `fedclip run` and `flwr run .` find it.

    It has this package's two apps, and a pyproject.toml with every setting, its meaning, and its value: the default, or
    the one given here. Every run from that folder uses these values. Nothing is overwritten. Real sites accept this app
    as they accept the installed one.

    Example: fedclip init study data=folder:images num-server-rounds=50; cd study; fedclip run --nodes 4
    """
    from fedclip_flwr.operations import scaffold  # not for --help

    typer.echo(scaffold.init(folder, settings or []))


@command()
def encode(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    out: Annotated[
        str, option("The feature folder to write; without it, features are only stored, for runs on this machine.")
    ] = "",
) -> None:
    """Encode a data set ahead of time, and write its features as a folder for data=features:PATH.

    Settings are data, model, model-revision, prompt, class-names, precision, device, and those of columns; `fedclip run
    --help` explains them. After an interruption, the same command resumes.

    Example: fedclip encode data=folder:images model=openai/clip-vit-base-patch32 --out features
    """
    from fedclip_flwr.inference import encode
    from fedclip_flwr.operations import simulation  # not for --help: they bring torch

    simulation.stop_in_order("Stopped. Encoded features are kept: the same command resumes from here.")
    typer.echo(encode.encode(settings or [], out))


@command()
def sweep(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    data: Annotated[str, option("As the setting data: pacs, folder:PATH, features:PATH… (default: drawn).")] = "drawn",
    model: Annotated[str, option("As the setting model (default: bundled).")] = "bundled",
    methods: Annotated[
        str,
        option(
            "Comma list of zero-shot, local, fedavg, fedprox, paper, one-round, one-round-chosen, one-round-full, "
            "attention, gate, scale, blend, lora, lora-both, centralised (default: all but those with LoRA)."
        ),
    ] = "",
    holdouts: Annotated[
        str,
        option(
            "Comma list of domains to hold out in turn, several at once with +; pairs; classes (default: each domain)."
        ),
    ] = "",
    nodes: Annotated[int, option("Number of sites (default: one for each seen domain).", "--nodes", "-n")] = 0,
    seeds: Annotated[int, option("Number of seeds, each with its own splits and initial weights (default: 3).")] = 3,
    first_seed: Annotated[int, option("The first seed (default: 0).")] = 0,
    rounds: Annotated[int, option("Number of rounds (default: 20).")] = 20,
    full_model_rounds: Annotated[int, option("Number of rounds if the whole model is trained (default: 5).")] = 5,
    full_model_seeds: Annotated[int, option("Number of seeds if the whole model is trained (default: 1).")] = 1,
    jobs: Annotated[int, option("Number of processes (default: one per core, or 1 with a GPU).")] = 0,
    out: Annotated[str, option("The results folder (default: one below FEDCLIP_HOME/sweeps).")] = "",
    name: Annotated[str, option("Name of the sweep, and of its folder below FEDCLIP_HOME/sweeps.")] = "",
    against: Annotated[str, option("The method to compare all others with, beside zero-shot (default: paper).")] = "",
) -> None:
    """Compare methods: every one on every held-out domain, with several seeds, in one table.

    Results are kept: the same command resumes a stopped sweep, and a larger sweep reuses existing results. Settings
    that all methods share can be given, too, such as partition=iid or local-epochs=2; `fedclip run --help` lists them.
    The exit status is 0 only if the table is complete.

    The results folder has the tables (table.md; accuracy.md and accuracy.tex with one metric in each cell), figures of
    each site with each seed (results.csv), differences with intervals and tests (differences.csv), and plots.

    Examples: fedclip sweep --data pacs --model openai/clip-vit-base-patch32; fedclip sweep --data features:PATH --seeds
    10 --methods paper,gate
    """
    options = dict(locals())  # named as the fields of SweepOptions
    from fedclip_flwr.experiments import comparison  # not for --help: these bring torch
    from fedclip_flwr.operations import simulation

    simulation.stop_in_order("Stopped. The results so far are kept: the same command resumes from here.")
    typer.echo(comparison.compare(comparison.SweepOptions(**{**options, "settings": settings or []})))
