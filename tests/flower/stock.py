"""Flower's own SuperLink, for tests that show what it lets through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.processes import SuperLink
from fedclip_flwr.flower import lines
from fedclip_flwr.operations import simulation
from fedclip_flwr.operations.ports import free_ports


@contextmanager
def stock(folder: Path, keys: Path) -> Iterator[SuperLink]:
    """Runs one with TLS, which takes only registered nodes."""
    folder.mkdir()
    own = keys / "server"
    files = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
    options = ["--enable-supernode-auth", *(f"--ssl-{name}={own / file}" for name, file in files.items())]
    fleet, control = free_ports(2)
    options += lines.address(lines.line().simulation_address, f"127.0.0.1:{control}")
    if lines.line() is lines.HTTP:
        fleet = control
    else:
        options.append(f"--fleet-api-address=127.0.0.1:{fleet}")
    simulation.connect(folder, control, f'root-certificates = "{own / "ca.crt"}"')
    env, log = simulation.environment(folder), folder / "superlink.log"
    with simulation.started(["flower-superlink", *options], env, log) as process:
        for port in {control, fleet}:
            simulation.wait_for(port, process, log)
        yield SuperLink(folder, env, fleet, control, 0, keys, process)
