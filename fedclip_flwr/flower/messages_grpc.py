"""Messages over gRPC: how a call fails."""

from __future__ import annotations

import grpc

CallFailed = grpc.RpcError
"""What a ServerApp's failed call raises."""


def too_large(error: grpc.RpcError) -> bool:
    """True if the answer is larger than a call may bring."""
    assert isinstance(error, grpc.Call)  # true of all errors that a stub raises
    return bool(error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED)


def act_as_server(run: int, node: int) -> None:
    """On this line messages can be made anywhere."""
