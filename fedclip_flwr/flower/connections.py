"""How `fedclip doctor` reaches a SuperLink: in the same way as Flower's commands and SuperNodes.

Flower has only commands for this and no functions, and their output can't be parsed reliably.
"""

from __future__ import annotations

from flwr.cli.constant import FLOWER_CONFIG_FILE  # the name of the commands' configuration
from flwr.cli.constant import LOCAL_SUPERLINK_ADDRESS_MAGIC_VALUE as LOCAL_SUPERLINK  # "one on this machine", there
from flwr.cli.flower_config import read_superlink_connection  # that configuration, read
from flwr.cli.utils import init_channel_from_connection  # the commands' own channel
from flwr.client.grpc_rere_client.node_auth_client_interceptor import (
    NodeAuthClientInterceptor,  # signs as a SuperNode does
)
from flwr.common.config import parse_config_args  # node configs, as `--node-config` is read
from flwr.common.grpc import create_channel  # a SuperNode's own channel
from flwr.proto.control_pb2 import ListNodesRequest  # `flwr supernode list` as a message
from flwr.proto.control_pb2_grpc import ControlStub  # and where it is sent
from flwr.proto.fleet_pb2 import ActivateNodeRequest  # a SuperNode's first message
from flwr.proto.fleet_pb2_grpc import FleetStub  # and where it is sent
from flwr.proto.node_pb2 import NodeInfo  # what that list holds
from flwr.supercore.address import parse_address  # addresses, as the flags are read
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME as IN_MEMORY  # "no file", for a SuperLink's --database
from flwr.supercore.constant import NodeStatus  # what the list says of a node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes  # a key, as it is sent
from flwr.supercore.utils import get_flwr_home  # where that configuration is

__all__ = [
    "FLOWER_CONFIG_FILE",
    "IN_MEMORY",
    "LOCAL_SUPERLINK",
    "ActivateNodeRequest",
    "ControlStub",
    "FleetStub",
    "ListNodesRequest",
    "NodeAuthClientInterceptor",
    "NodeInfo",
    "NodeStatus",
    "create_channel",
    "get_flwr_home",
    "init_channel_from_connection",
    "parse_address",
    "parse_config_args",
    "public_key_to_bytes",
    "read_superlink_connection",
]
