"""Commands for real sites and their server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedclip_flwr.base import UserError
from fedclip_flwr.cli.common import RESULTS_DIR, command, option


@command()
def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    server: Annotated[
        str,
        option("Comma list of names and IP addresses by which sites reach the server; localhost is always added."),
    ] = "",
    site: Annotated[list[str] | None, option("Name of a site; repeat it for more sites.")] = None,
    days: Annotated[int | None, option("Lifetime of the server's certificate in days (default: 825).")] = None,
) -> None:
    """Make the keys of a federation of real sites: for TLS to the server, and to authenticate the sites.

    DIR then has a folder for each machine: ca (stays here), server, and sites/NAME. Nothing is overwritten:
    sites can be added later. The administrator of a site can make its key pair there, without --server, so that
    the secret key never leaves the site.

    Examples: fedclip keys keys --server fl.example.org --site north --site south; fedclip keys mine --site north
    """
    from fedclip_flwr.operations import keys  # not for --help

    typer.echo(keys.make(folder, server, site or [], days))


@command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def server(given: typer.Context) -> None:
    """Start the server: Flower's SuperLink, changed so that no site can speak for another.

    The options are those of flower-superlink, and on each of Flower's lines --fleet-api-address,
    --control-api-address and --serverappio-api-address.

    Example: fedclip server --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key
    --enable-supernode-auth --database superlink.db --control-api-address 127.0.0.1:9093
    """
    from fedclip_flwr.flower import superlink  # not for --help

    superlink.start(given.args)


@command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def site(given: typer.Context) -> None:
    """Start this site: Flower's SuperNode, changed so that it runs only the code installed on this machine.

    The options are those of flower-supernode, and --clientappio-api-address. A server sends the app that sites are to
    run; this site refuses any app that is not identical to the installed one. It listens on this machine only.

    Example: fedclip site --superlink fl.example.org:9092 --root-certificates ca.crt --auth-supernode-private-key
    node.key --node-config "site='north' data='folder:/data/north'"
    """
    from fedclip_flwr.flower import pinned  # not for --help

    pinned.start(given.args)


@command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def relay(
    given: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", show_default=False)],
    node_config: Annotated[str, option("The name of this site there: \"site='NAME'\".")] = "",
    results_dir: Annotated[Path | None, option(RESULTS_DIR)] = None,
) -> None:
    """Let a group take part in a federation above it, as one site, with the sums of its own run.

    RUN is a run of the group's server on this machine, with method=one-round. This starts a site that answers the
    server above with the sums of RUN's newest complete version: no image, and nothing of a single site of the group.
    All other options are those of `fedclip site`. After `fedclip update RUN` or `fedclip forget RUN` here, an update of
    the run above takes the new sums in place of the old ones.

    Example: fedclip relay study --superlink fl.example.org:9092 --root-certificates ca.crt
    --auth-supernode-private-key node.key --node-config "site='west'"
    """
    from fedclip_flwr.operations import relay  # not for --help: it brings torch

    relay.start(run, results_dir, node_config, given.args, typer.echo)


@command()
def doctor(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[server|site] [KEY=VALUE]...", show_default=False)
    ] = None,
    superlink: Annotated[str, option("At a site: the server's address, HOST:9092.")] = "",
    root_certificates: Annotated[Path | None, option("At a site: ca.crt, the server's certificate authority.")] = None,
    auth_supernode_private_key: Annotated[Path | None, option("At a site: node.key, the site's own key.")] = None,
    node_config: Annotated[str, option("At a site: its name and data, \"site='NAME' data='folder:/PATH'\".")] = "",
    ssl_ca_certfile: Annotated[Path | None, option("At the server: ca.crt.")] = None,
    ssl_certfile: Annotated[Path | None, option("At the server: server.crt.")] = None,
    ssl_keyfile: Annotated[Path | None, option("At the server: server.key.")] = None,
    fleet_api_address: Annotated[str, option("At the server (default: port 9092).")] = "",
    control_api_address: Annotated[str, option("At the server (default: port 9093).")] = "",
    serverappio_api_address: Annotated[str, option("At the server (default: port 9091).")] = "",
    host: Annotated[
        str, option("At the server: the name by which sites reach it, which must be in the certificate.")
    ] = "",
    on: Annotated[
        str, option("At the server: the SuperLink's name in Flower's configuration, to ask it for its nodes.")
    ] = "",
    insecure: Annotated[bool, option("TLS is not used.", "--insecure")] = False,
    show_outgoing: Annotated[
        bool,
        option("At a site: instead of checks, show what a round would send; nothing is sent.", "--show-outgoing"),
    ] = False,
    out: Annotated[str, option("With --show-outgoing: a folder for all of its values.")] = "",
    as_json: Annotated[bool, option("Print the findings as JSON: state, what, found, remedy.", "--json")] = False,
) -> None:
    """Check whether this machine is ready for its part in a federation of real sites, and say what to fix.

    Without `server` or `site`, it checks only what any machine needs. The options are those of flower-superlink and
    flower-supernode: give the same values. Settings are the run's, as for `fedclip run`, if they are known: above all
    class-names, prompt and model. Nothing is changed or downloaded; only --show-outgoing encodes what is not encoded
    yet. The exit status is 0 if no check has failed, 1 if one has, 2 if the options are invalid.

    Examples: fedclip doctor site --superlink fl.example.org:9092 --root-certificates ca.crt
    --auth-supernode-private-key node.key --node-config "site='north' data='folder:/data'"; fedclip doctor server
    --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key --on hospitals
    """
    from fedclip_flwr.operations import doctor, outgoing  # not for --help: they bring torch

    site = doctor.Site(superlink, root_certificates, auth_supernode_private_key, node_config)
    addresses = fleet_api_address, control_api_address, serverappio_api_address
    server = doctor.Server(ssl_ca_certfile, ssl_certfile, ssl_keyfile, *addresses, host, on)
    if (show_outgoing and (not node_config or as_json)) or (out and not show_outgoing):
        raise UserError("expected: fedclip doctor site --node-config … --show-outgoing, with or without --out")
    task = doctor.read(words or [], site, server, insecure)
    fine = (
        outgoing.show(task.run, task.node, out, typer.echo)
        if show_outgoing
        else doctor.examine(task, typer.echo, as_json)
    )
    raise typer.Exit(0 if fine else 1)
