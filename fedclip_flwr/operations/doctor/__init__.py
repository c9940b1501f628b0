"""The command `fedclip doctor`: checks that a machine is ready for a federation of real sites, and says what to fix.

It changes nothing: nothing is encoded or downloaded, and no run is disturbed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from click import ClickException

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import unusable
from fedclip_flwr.flower.connections import parse_config_args
from fedclip_flwr.operations.doctor import holdings, links, machine
from fedclip_flwr.operations.doctor.endpoints import read_address
from fedclip_flwr.operations.doctor.findings import Examination
from fedclip_flwr.runs import read_settings


class Site(NamedTuple):
    """The options of a SuperNode, under the names of its flags."""

    superlink: str = ""
    root_certificates: Path | None = None
    auth_supernode_private_key: Path | None = None
    node_config: str = ""


class Server(NamedTuple):
    """The options of a SuperLink; its name for sites (`host`), and in Flower's configuration (`on`)."""

    ssl_ca_certfile: Path | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    fleet_api_address: str = ""
    control_api_address: str = ""
    serverappio_api_address: str = ""
    host: str = ""
    on: str = ""


class Task(NamedTuple):
    """The parsed command: the part in a federation (None: any machine), the run's settings, the site's node config."""

    part: links.Site | links.Server | None
    given: Sequence[str]
    run: Settings
    node: Mapping[str, Any]


def read(words: Sequence[str], site: Site, server: Server, insecure: bool) -> Task:
    """The task, from `words` (`site` or `server`, then the run's settings) and the options of both sides."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's client is imported
    side, given = (words[0], words[1:]) if words and words[0] in ("site", "server") else ("", words)
    for other, options in {"site": site._asdict(), "server": server._asdict()}.items():
        if side != other and (wrong := [name for name, value in options.items() if value]):
            raise UserError(f"--{wrong[0].replace('_', '-')} is for one side: fedclip doctor {other}")
    if given and not side:
        raise UserError(f"{given[0]}: name the side first: fedclip doctor server, or fedclip doctor site")
    node = read_node(site.node_config) if site.node_config else {}
    part = _site(site, insecure) if side == "site" else _server(server, insecure) if side == "server" else None
    known = {"data": "none"} if side == "site" else {}  # the server's data, which a site need not know
    return Task(part, given, read_run(given, known), node)


def examine(task: Task, tell: Callable[[str], None], as_json: bool = False) -> bool:
    """Reports each finding at once, or all at the end as JSON; returns False if a check has failed."""
    ex = Examination((lambda _: None) if as_json else tell)
    machine.examine(ex)
    needed = 0
    if isinstance(task.part, links.Server):
        ex.look("links", links.examine_server, ex, task.part)
        if task.given:
            needed = ex.look("data", holdings.examine_server, ex, task.run) or 0
        else:
            ex.note("run", "model and data not checked", "give the run's settings, too, as for fedclip run")
    elif task.part:
        ex.look("links", links.examine_site, ex, task.part)
        if task.node:
            needed = ex.look("data", holdings.examine_site, ex, task.run, task.node) or 0
        else:
            ex.note("data", "not checked", "give --node-config \"site='NAME' data='folder:/PATH'\"")
    ex.look("disk", machine.free, ex, needed)
    tell(json.dumps([finding._asdict() for finding in ex.findings], indent=2) if as_json else f"\n{ex.summary()}")
    return not ex.failed


def _site(site: Site, insecure: bool) -> links.Site:
    superlink = read_address(site.superlink, "--superlink") if site.superlink else None
    return links.Site(superlink, site.root_certificates, site.auth_supernode_private_key, insecure)


def _server(server: Server, insecure: bool) -> links.Server:
    return links.Server(
        read_address(server.fleet_api_address or "0.0.0.0:9092", "--fleet-api-address"),
        read_address(server.control_api_address or "0.0.0.0:9093", "--control-api-address"),
        read_address(server.serverappio_api_address or "0.0.0.0:9091", "--serverappio-api-address"),
        server.ssl_ca_certfile,
        server.ssl_certfile,
        server.ssl_keyfile,
        insecure,
        server.host,
        server.on,
    )


def read_run(given: Sequence[str], known: Mapping[str, Any]) -> Settings:
    """A run's settings, from `key=value` and from `known` values."""
    values, problems = read_settings(given)
    settings, found = Settings.read({**known, **values})
    if problems := {**problems, **found}:
        raise unusable(problems.values())
    return settings


def read_node(text: str) -> Mapping[str, Any]:
    """A node config, as Flower reads it."""
    try:
        node = parse_config_args([text])
    except (ClickException, OSError):
        node = {}
    if not node:
        raise UserError(f"--node-config {text!r}: expected KEY=VALUE with strings in quotes, such as \"site='north'\"")
    return node
