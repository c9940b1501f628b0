"""The two lines of Flower that this package runs on, and all that differs between them by version.

The gRPC line is 1.31: gRPC between all parts. The HTTP line is the newest: HTTP between all parts. Nothing else here
asks for Flower's version: what differs is in the table, or in a module of this wing with the line's name at its end.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from packaging.version import Version

from fedclip_flwr.base import UserError


class Line(NamedTuple):
    """One line: its transport, the release that is tested, and the options that differ."""

    transport: str
    tested: str
    site_address: Mapping[str, str]
    """A SuperNode's options for the address at which it listens on its own machine."""
    simulation_address: Mapping[str, str]
    """The options for the address of a SuperLink that simulates sites."""

    @property
    def name(self) -> str:
        """The end of the names of this line's modules."""
        return self.transport.lower()


GRPC = Line(
    transport="gRPC",
    tested="1.31",
    site_address={"--clientappio-api-address": "{address}"},
    simulation_address={"--control-api-address": "{address}", "--serverappio-api-address": "{host}:0"},
)
HTTP = Line(
    transport="HTTP",
    tested="1.42",
    site_address={"--host": "{host}", "--port": "{port}"},
    simulation_address={"--host": "{host}", "--port": "{port}"},
)
LINES = (GRPC, HTTP)
FIRST_OF_HTTP = Version("1.36")
"""The first release whose parts mostly speak HTTP."""
NO_INSTALLATION = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
"""The environment in which a SuperLink installs nothing at a run: newer ones make an environment for each app."""


@cache
def installed() -> str:
    """The version of Flower that is installed."""
    try:
        return version("flwr")
    except PackageNotFoundError:
        raise UserError("flwr is not installed here: install fedclip-flwr with pip, which brings it") from None


@cache
def line() -> Line:
    """The line that is installed."""
    return HTTP if Version(installed()) >= FIRST_OF_HTTP else GRPC


def untested() -> str:
    """A warning if nobody has tried this version of Flower; else empty."""
    if installed().rpartition(".")[0] in {each.tested for each in LINES}:
        return ""
    tried = " and ".join(f"{each.tested}.x" for each in LINES)
    return (
        f"Flower {installed()} has not been tried with fedclip-flwr: {tried} were. If anything fails: "
        f"pip install 'flwr=={line().tested}.*'"
    )


def warn() -> None:
    """Print the warning about a version that nobody has tried, if this is one."""
    if warning := untested():
        print(warning, flush=True)


def module(name: str) -> Any:
    """This wing's module of that name for the installed line."""
    return import_module(f"{__package__}.{name}_{line().name}")


def address(options: Mapping[str, str], address: str) -> list[str]:
    """The options with this address, HOST:PORT, in them."""
    host, _, port = address.rpartition(":")
    return [
        f"{name}={value.format(address=address, host=host.strip('[]'), port=port)}" for name, value in options.items()
    ]


def is_loopback(host: str) -> bool:
    """True if only this machine reaches what listens at that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name may lead anywhere
        return False
