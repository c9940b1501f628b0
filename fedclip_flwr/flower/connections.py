"""How `fedclip doctor` reaches a SuperLink: in the same way as Flower's commands and SuperNodes.

Flower has only commands for this and no functions, and their output can't be parsed reliably. How calls are made is in
this wing's modules `connections_grpc` and `connections_http`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.constant import FLOWER_CONFIG_FILE  # the name of the commands' configuration
from flwr.cli.constant import LOCAL_SUPERLINK_ADDRESS_MAGIC_VALUE as LOCAL_SUPERLINK  # "one on this machine", there
from flwr.cli.flower_config import read_superlink_connection  # that configuration, read
from flwr.common.config import parse_config_args  # node configs, as `--node-config` is read
from flwr.proto.node_pb2 import NodeInfo  # what a list of nodes holds
from flwr.supercore.address import parse_address  # addresses, as the flags are read
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME as IN_MEMORY  # "no file", for a SuperLink's --database
from flwr.supercore.constant import FLWR_PACKAGE_VERSION_METADATA_KEY as VERSION  # how Flower's clients tell theirs
from flwr.supercore.constant import NodeStatus  # what the list says of a node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes  # a key, as it is sent
from flwr.supercore.utils import get_flwr_home  # where that configuration is

from fedclip_flwr.flower import lines

__all__ = [
    "FLOWER_CONFIG_FILE",
    "IN_MEMORY",
    "LOCAL_SUPERLINK",
    "VERSION",
    "CallError",
    "ClockError",
    "ElsewhereError",
    "NodeInfo",
    "NodeStatus",
    "get_flwr_home",
    "knows",
    "nodes",
    "parse_address",
    "parse_config_args",
    "public_key_to_bytes",
    "read_superlink_connection",
    "version",
]


class CallError(Exception):
    """A call that is not answered as expected: what came instead."""


class ClockError(CallError):
    """A signature that is refused because this machine's clock differs from the server's."""


class ElsewhereError(CallError):
    """A server that has no such API at this port."""


def knows(address: str, key: ec.EllipticCurvePrivateKey, ca: Path | None, patience: float) -> bool:
    """True if the SuperLink has registered this key, even if its SuperNode is not running; without `ca` without TLS.

    It is asked to activate the node with an invalid heartbeat interval: Flower looks up the key before it refuses that,
    and changes nothing.
    """
    found: bool = lines.module("connections").knows(address, key, ca, patience)
    return found


def version(address: str, key: ec.EllipticCurvePrivateKey, ca: Path | None, patience: float) -> str:
    """The SuperLink's version of Flower; empty if it does not tell it."""
    found: str = lines.module("connections").version(address, key, ca, patience)
    return found


def nodes(connection: str, patience: float) -> Sequence[NodeInfo]:
    """The nodes known to the SuperLink of that name in Flower's configuration."""
    found: Sequence[NodeInfo] = lines.module("connections").nodes(read_superlink_connection(connection), patience)
    return found
