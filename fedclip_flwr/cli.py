"""The command `fedclip`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    lines = ["Settings and their defaults:"]
    for key, field in Settings.keys().items():
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        choices = field.metadata.get("choices")
        meaning = field.metadata["meaning"] + (f" ({', '.join(choices)})" if choices else "")
        lines.append(f"  {key}={default}: {meaning}")
    return "\b\n" + "\n".join(lines)


@app.command(epilog=_settings())
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
) -> None:
    """Simulate a federation on this machine, from its plan to its summary; or run one with real sites.

    A simulation has a SuperLink of its own, started and stopped. The exit status is 0 only if the run was completed: 1
    if it failed, 2 if the settings can't be used. Paths may be relative; those of a SuperLink's machine must not.

    A run that was interrupted goes on after its last complete round, with its own settings and as many sites: fedclip
    run resume=latest, or the name of its folder.

    Examples: fedclip run --nodes 4 data=folder:images num-server-rounds=50; fedclip run --on hospitals min-sites=3
    """
    from fedclip_flwr import simulation  # not for --help: it brings torch

    try:
        if on and nodes is not None:
            raise UserError(f"--nodes {nodes}: the SuperLink {on} has its own sites; leave it out")
        given = settings or []
        code = simulation.run_on(on, given) if on else simulation.run(nodes, given)
    except UserError as error:
        typer.echo(str(error), err=True)
        code = 2
    raise typer.Exit(code)


def _option(text: str, *names: str) -> Any:
    """An option whose help says its default itself: typer would put a stray backslash before it."""
    return typer.Option(*names, help=text, show_default=False)


@app.command()
def encode(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    out: Annotated[
        str, _option("The feature folder; without it the features are only stored, for runs on this machine.")
    ] = "",
) -> None:
    """Encode a data set ahead of time, and write its features as a folder that data=features:PATH takes.

    Settings are data, model, model-revision, prompt, class-names, precision, device, and those of columns; `fedclip run
    --help` tells of them. What was interrupted goes on when the same command is given again.

    Example: fedclip encode data=folder:images model=openai/clip-vit-base-patch32 --out features
    """
    from fedclip_flwr import export, simulation  # not for --help: they bring torch

    simulation.stop_in_order("Stopped. What is encoded is kept: the same command goes on from here.")
    try:
        typer.echo(export.encode(settings or [], out))
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


@app.command()
def sweep(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    data: Annotated[
        str, _option("As the setting data: pacs, folder:PATH, features:PATH…; drawn unless said.")
    ] = "drawn",
    model: Annotated[str, _option("As the setting model; bundled unless said.")] = "bundled",
    methods: Annotated[
        str,
        _option(
            "With commas: zero-shot, local, fedavg, fedprox, paper, attention, gate, scale, blend, centralised; all "
            "unless said."
        ),
    ] = "",
    holdouts: Annotated[str, _option("Domains to hold out in turn, with commas; every one unless said.")] = "",
    nodes: Annotated[int, _option("How many sites; one for each seen domain unless said.", "--nodes", "-n")] = 0,
    seeds: Annotated[
        int, _option("How many seeds, each with other splits and other random weights; 3 unless said.")
    ] = 3,
    first_seed: Annotated[int, _option("The first of them; 0 unless said.")] = 0,
    rounds: Annotated[int, _option("Rounds; 20 unless said.")] = 20,
    full_model_rounds: Annotated[int, _option("Rounds where the whole model is trained; 5 unless said.")] = 5,
    full_model_seeds: Annotated[int, _option("How many of the seeds then; 1 unless said.")] = 1,
    jobs: Annotated[int, _option("Processes; as many as there are cores unless said, or 1 with a GPU.")] = 0,
    out: Annotated[str, _option("The table's folder; one below FEDCLIP_HOME/sweeps unless said.")] = "",
) -> None:
    """Compare methods: every one on every held-out domain, with several seeds, in one table.

    Results are kept: a sweep that was stopped goes on when the same command is given again, and a larger one takes over
    what is there. Settings that are the same for all methods can be given too, such as partition=iid or local-epochs=2;
    `fedclip run --help` lists them. The exit status is 0 only if the table is complete.

    Examples: fedclip sweep --data pacs --model openai/clip-vit-base-patch32; fedclip sweep --data features:PATH --seeds
    10 --methods paper,gate
    """
    from fedclip_flwr import comparison, simulation  # not for --help: they bring torch

    simulation.stop_in_order("Stopped. The results so far are kept: the same command goes on from here.")
    wishes = comparison.Wishes(
        data,
        model,
        methods,
        holdouts,
        nodes,
        seeds,
        first_seed,
        rounds,
        full_model_rounds,
        full_model_seeds,
        jobs,
        out,
        settings or [],
    )
    try:
        typer.echo(comparison.compare(wishes))
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    server: Annotated[
        str,
        _option("Names and IP addresses by which sites reach the server, with commas; localhost is always among them."),
    ] = "",
    site: Annotated[list[str] | None, _option("A site; once for each.")] = None,
    days: Annotated[int | None, _option("The life of the server's certificate; 825 unless said.")] = None,
) -> None:
    """Make the keys of a federation of real sites: for TLS to the server, and to know the sites.

    In DIR there is then a folder for each machine: ca (stays here), server, and sites/NAME. Nothing is overwritten:
    sites can be added later. The administrator of a site can make its key pair alone, without --server, so that the
    secret key never leaves the site.

    Examples: fedclip keys keys --server fl.example.org --site north --site south; fedclip keys mine --site north
    """
    from fedclip_flwr import keys  # not for --help

    try:
        typer.echo(keys.make(folder, server, site or [], days))
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def server(given: typer.Context) -> None:
    """Start the server: Flower's SuperLink, which here lets no site speak for another one.

    The options are those of flower-superlink.

    Example: fedclip server --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key
    --enable-supernode-auth --database superlink.db --control-api-address 127.0.0.1:9093
    """
    from fedclip_flwr import superlink  # not for --help

    superlink.start(given.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def site(given: typer.Context) -> None:
    """Start this site: Flower's SuperNode, which here runs no other code than what is installed on this machine.

    The options are those of flower-supernode. A server sends the app that sites are to run; this one refuses any that
    is not the installed one, to the byte. It listens to this machine only.

    Example: fedclip site --superlink fl.example.org:9092 --root-certificates ca.crt --auth-supernode-private-key
    node.key --node-config "site='north' data='folder:/data/north'"
    """
    from fedclip_flwr import pinned  # not for --help

    try:
        pinned.start(given.args)
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


@app.command()
def doctor(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[server|site] [KEY=VALUE]...", show_default=False)
    ] = None,
    superlink: Annotated[str, _option("At a site: where the server is, HOST:9092.")] = "",
    root_certificates: Annotated[Path | None, _option("At a site: ca.crt, the server's authority.")] = None,
    auth_supernode_private_key: Annotated[Path | None, _option("At a site: node.key, its own key.")] = None,
    node_config: Annotated[str, _option("At a site: its name and data, \"site='NAME' data='folder:/PATH'\".")] = "",
    ssl_ca_certfile: Annotated[Path | None, _option("At the server: ca.crt.")] = None,
    ssl_certfile: Annotated[Path | None, _option("At the server: server.crt.")] = None,
    ssl_keyfile: Annotated[Path | None, _option("At the server: server.key.")] = None,
    fleet_api_address: Annotated[str, _option("At the server; 0.0.0.0:9092 unless said.")] = "",
    control_api_address: Annotated[str, _option("At the server; 0.0.0.0:9093 unless said.")] = "",
    serverappio_api_address: Annotated[str, _option("At the server; 0.0.0.0:9091 unless said.")] = "",
    host: Annotated[
        str, _option("At the server: the name by which sites reach it, which the certificate must have.")
    ] = "",
    on: Annotated[
        str, _option("At the server: what Flower's configuration calls the SuperLink, to ask it for its nodes.")
    ] = "",
    insecure: Annotated[bool, _option("There is no TLS.", "--insecure")] = False,
    show_outgoing: Annotated[
        bool,
        _option("At a site: instead, show all that a round would send, and send nothing.", "--show-outgoing"),
    ] = False,
    out: Annotated[str, _option("With --show-outgoing: a folder for all of it, number by number.")] = "",
) -> None:
    """Look whether this machine is fit for its part in a federation of real sites, and say what to mend.

    Without a side, only what any machine needs. The options are those of flower-superlink and flower-supernode: give
    the same words. Settings are the run's, as for `fedclip run`, where they are known: above all class-names, prompt
    and model. Nothing is changed or downloaded; only --show-outgoing encodes what is not encoded yet. The exit status
    is 0 if nothing has failed, 1 if something has, 2 if the options can't be used.

    Examples: fedclip doctor site --superlink fl.example.org:9092 --root-certificates ca.crt
    --auth-supernode-private-key node.key --node-config "site='north' data='folder:/data'"; fedclip doctor server
    --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key --on hospitals
    """
    from fedclip_flwr import doctor, outgoing  # not for --help: they bring torch

    site = doctor.Site(superlink, root_certificates, auth_supernode_private_key, node_config)
    server = doctor.Server(
        ssl_ca_certfile,
        ssl_certfile,
        ssl_keyfile,
        fleet_api_address,
        control_api_address,
        serverappio_api_address,
        host,
        on,
    )
    try:
        if (show_outgoing and not node_config) or (out and not show_outgoing):
            raise UserError("expected: fedclip doctor site --node-config … --show-outgoing, with or without --out")
        task = doctor.read(words or [], site, server, insecure)
        fine = (
            outgoing.show(task.run, task.node, out, typer.echo) if show_outgoing else doctor.examine(task, typer.echo)
        )
    except UserError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(0 if fine else 1)
