"""What a ServerApp needs for its messages over gRPC."""

from __future__ import annotations

from typing import Any

import grpc
from flwr.common.exit import add_exit_handler as add_exit_handler  # no other notice of a ServerApp's end
from flwr.proto.appio_pb2 import PullAppMessagesRequest as PullAppMessagesRequest  # a grid would fetch the parts, too
from flwr.superlink.grid import GrpcGrid as RemoteGrid  # no public way to distinguish the grids

CallFailed = grpc.RpcError
"""The exception of a ServerApp's failed call."""


def calls(grid: RemoteGrid) -> Any:
    """The grid's client of the SuperLink's API."""
    return grid._stub


def too_large(error: grpc.RpcError) -> bool:
    """True if the answer is larger than a call may bring."""
    assert isinstance(error, grpc.Call)  # true of all errors that a stub raises
    return bool(error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED)


def act_as_server(run: int, node: int) -> None:
    """On this line messages can be made anywhere."""
