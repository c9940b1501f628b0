"""Calls to a SuperLink over gRPC."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.utils import init_channel_from_connection  # the commands' own channel
from flwr.client.grpc_rere_client.node_auth_client_interceptor import (
    NodeAuthClientInterceptor,  # signs as a SuperNode does
)
from flwr.common.grpc import create_channel  # a SuperNode's own channel
from flwr.proto.control_pb2 import ListNodesRequest  # `flwr supernode list` as a message
from flwr.proto.control_pb2_grpc import ControlStub  # and where it is sent
from flwr.proto.fleet_pb2 import ActivateNodeRequest  # a SuperNode's first message
from flwr.proto.fleet_pb2_grpc import FleetStub  # and where it is sent
from flwr.proto.node_pb2 import NodeInfo  # what a list of nodes holds
from flwr.supercore.constant import (
    FLWR_COMPONENT_NAME_METADATA_KEY,  # how Flower's clients tell what they are
    FLWR_PACKAGE_NAME_METADATA_KEY,  # and of which package
    VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY,  # how a server tells its version to another version
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes  # a key, as it is sent

from fedclip_flwr.flower.connections import VERSION, CallError, ClockError, ElsewhereError

OTHER = ((FLWR_PACKAGE_NAME_METADATA_KEY, "flwr"), (VERSION, "0.0.0"), (FLWR_COMPONENT_NAME_METADATA_KEY, "doctor"))
"""A version that no server has, so that it tells its own."""
Ended = tuple[grpc.StatusCode, str, str]
"""The status, the message and the server's version, of a call that has failed, as it should."""


def knows(address: str, key: ec.EllipticCurvePrivateKey, ca: Path | None, patience: float) -> bool:
    code, details, _ = _activated(address, key, ca, patience)
    if code not in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION):
        _fail(code, details)
    return bool(code == grpc.StatusCode.INVALID_ARGUMENT)


def version(address: str, key: ec.EllipticCurvePrivateKey, ca: Path | None, patience: float) -> str:
    return _activated(address, key, ca, patience)[2]


def nodes(connection: Any, patience: float) -> Sequence[NodeInfo]:
    with _open(init_channel_from_connection(connection)) as channel:
        try:
            return list(ControlStub(channel).ListNodes(ListNodesRequest(), timeout=patience).nodes_info)
        except grpc.RpcError as error:
            _fail(*_of(error)[:2])


def _activated(address: str, key: ec.EllipticCurvePrivateKey, ca: Path | None, patience: float) -> Ended:
    """How a call ends that should activate the node, with an invalid heartbeat interval."""
    public = key.public_key()
    request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0.0)
    signing = NodeAuthClientInterceptor(key, public)
    root = ca.read_bytes() if ca else None
    with _open(create_channel(address, ca is None, root, interceptors=[signing])) as channel:
        try:
            FleetStub(channel).ActivateNode(request, timeout=patience, metadata=OTHER)
        except grpc.RpcError as error:
            return _of(error)
    raise CallError("it activates a node without a heartbeat")


@contextmanager
def _open(channel: grpc.Channel) -> Iterator[grpc.Channel]:
    try:
        yield channel
    finally:
        channel.close()


def _of(error: grpc.RpcError) -> Ended:
    assert isinstance(error, grpc.Call)  # true of all errors that a stub raises
    warning = dict(error.trailing_metadata() or ()).get(VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY, "")
    found = re.search(r"SuperLink version (\S+)", str(warning))
    return error.code(), " ".join(str(error.details()).split()), found[1] if found else ""


def _fail(code: grpc.StatusCode, details: str) -> NoReturn:
    if "timestamp" in details:
        raise ClockError(details)
    if code == grpc.StatusCode.UNIMPLEMENTED:
        raise ElsewhereError(details)
    raise CallError(f"{code.name}: {details}")
