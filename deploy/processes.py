"""A SuperLink and SuperNodes as processes of this machine: as with real sites, but on loopback.

With keys (a folder made by `fedclip keys` for a server called localhost) they use TLS, the SuperLink accepts only
registered nodes, and sites run only their own code; without keys, all is open.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedclip_flwr.base import UserError
from fedclip_flwr.flower import lines
from fedclip_flwr.flower.connections import IN_MEMORY
from fedclip_flwr.operations import simulation
from fedclip_flwr.operations.ports import free_ports

WAIT = 300.0
"""Seconds within which SuperNodes must connect."""
PAUSE = 1.0
"""Seconds between two polls for them: each poll starts a process, which slows down those that start."""


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink: the environment for Flower's commands, and its ports (SuperNodes use `fleet`)."""

    folder: Path
    env: Mapping[str, str]
    fleet: int
    control: int
    apps: int
    keys: Path | None
    process: subprocess.Popen[bytes]

    def register(self, *sites: str) -> None:
        """Registers the keys of these sites' SuperNodes."""
        assert self.keys is not None
        for site in sites:
            self.ask("supernode", "register", str(self.keys / "server" / f"{site}.pub"))

    def online(self) -> int:
        """The number of connected SuperNodes."""
        return sum(node["status"] == "online" for node in self.ask("supernode", "list")["nodes"])

    def wait_for(self, nodes: Sequence[SuperNode], say: Callable[[str], None] = lambda _: None) -> None:
        """Waits until all these SuperNodes are connected; reports progress to `say`."""
        deadline, before, count = time.monotonic() + WAIT, 0, len(nodes)
        while (now := self.online()) < count:
            if gone := [node for node in nodes if node.process.poll() is not None]:
                raise UserError(f"the SuperNode of {gone[0].site} ended: {simulation.last_words(gone[0].log)}")
            if time.monotonic() > deadline:
                raise UserError(f"{now} of {count} SuperNodes are connected after {WAIT:.0f} s: see {self.folder}")
            if now > before:
                say(f"{now} of {count} SuperNodes are connected")
                before = now
            time.sleep(PAUSE)

    def ask(self, *words: str) -> Any:
        """The answer of one of Flower's commands."""
        command = ["flwr", *words, simulation.CONNECTION, "--format", "json"]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        output = done.stdout.strip()
        try:
            answer = json.loads(output[output.index("{") :])
        except ValueError:
            answer = {}
        if not answer.get("success"):
            why = answer.get("error-message") or output or done.stderr.strip() or "no output"
            raise UserError(f"flwr {' '.join(words)} failed: {why}")
        return answer


@dataclass(frozen=True)
class SuperNode:
    """A running SuperNode of a site."""

    site: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def superlink(
    folder: Path,
    keys: Path | None = None,
    *,
    database: str = "superlink.db",
    ports: Sequence[int] | None = None,
    **env: str,
) -> Iterator[SuperLink]:
    """Runs a SuperLink; its files and log are in the folder, unless the `database` is elsewhere.

    A restarted one needs its previous `ports`: those for apps, sites and users.
    """
    folder.mkdir(parents=True, exist_ok=True)
    apps, fleet, control = ports or free_ports(3)
    if keys:
        own = keys / "server"
        trust = f'root-certificates = "{own / "ca.crt"}"'
        secured = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key"]
        secured = [str(own / word) if word in ("ca.crt", "server.crt", "server.key") else word for word in secured]
        options = [*secured, "--enable-supernode-auth"]
    else:
        trust, options = "insecure = true", ["--insecure"]
    options += ["--database", database if database == IN_MEMORY else str(folder / database)]
    for name, port in (("serverappio", apps), ("fleet", fleet), ("control", control)):
        options += [f"--{name}-api-address", f"127.0.0.1:{port}"]
    simulation.connect(folder, control, trust)
    full_env = {**simulation.environment(folder), **env}
    log = folder / "superlink.log"
    with simulation.started(["fedclip", "server", *options], full_env, log) as process:
        for port in (control, fleet):
            simulation.wait_for(port, process, log)
        yield SuperLink(folder, full_env, fleet, control, apps, keys, process)


@contextmanager
def supernode(
    link: SuperLink,
    site: str,
    config: str,
    *,
    port: int | None = None,
    options: Sequence[str] | None = None,
    group: str = "",
    **env: str,
) -> Iterator[SuperNode]:
    """Runs a SuperNode with that node config; it connects to `port` if given.

    `options` replace those that the SuperLink's keys require. With `group`, a run's folder, it is a relay.
    """
    (own,) = free_ports(1)
    command = ["fedclip", "site"] if link.keys else ["flower-supernode"]
    command = ["fedclip", "relay", group] if group else command
    command += ["--superlink", f"127.0.0.1:{port or link.fleet}", "--node-config", config]
    listens = {"--clientappio-api-address": "{address}"} if link.keys or group else lines.line().site_address
    command += lines.address(listens, f"127.0.0.1:{own}")
    command += credentials(link.keys, site) if options is None else options
    log = link.folder / f"{site}.log"
    with simulation.started(command, {**link.env, **env}, log) as process:
        yield SuperNode(site, process, log)


def credentials(keys: Path | None, site: str) -> list[str]:
    """The options for a site's SuperNode to trust the SuperLink, and to authenticate itself."""
    if not keys:
        return ["--insecure"]
    own = keys / "sites" / site
    return ["--root-certificates", str(own / "ca.crt"), "--auth-supernode-private-key", str(own / "node.key")]
