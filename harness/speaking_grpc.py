"""What a SuperNode of the gRPC line says to a SuperLink, without the SuperNode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import NOOP_FEDERATION, RunType
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor

CallFailed = grpc.RpcError
"""The exception of a refused call."""


@contextmanager
def speaking(port: int, key: ec.EllipticCurvePrivateKey, ca: Path | None = None) -> Iterator[Any]:
    """The Fleet API of this machine's SuperLink at that port, asked with that key; without `ca` without TLS."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 2000)]
    if ca:
        channel = grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(ca.read_bytes()), options)
    else:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
    interceptors = (
        RuntimeVersionClientInterceptor(component_name="SuperNode"),
        NodeAuthClientInterceptor(key, key.public_key()),
    )
    try:
        yield FleetStub(grpc.intercept_channel(channel, *interceptors))
    finally:
        channel.close()


def refusal(error: Any) -> tuple[bool, str]:
    """True if the call was refused because of who makes it; and the reason that was given."""
    return error.code() == grpc.StatusCode.UNAUTHENTICATED, str(error.details())


def pusher(stub: Any, node: Node, run: int, answer: Any) -> Callable[[str, bytes], None]:
    """What pushes a part of a message; `answer` came to the message itself."""
    return make_push_object_fn_protobuf(stub.PushObject, node, run)


def new_run(state: LinkState) -> int:
    """A run in a SuperLink's state."""
    return state.create_run(None, None, None, {}, NOOP_FEDERATION, None, None, RunType.SERVER_APP)


def answers(state: LinkState, run: int, messages: Sequence[str]) -> Sequence[Message]:
    """The answers that a SuperLink's state has to these messages of the run."""
    return state.get_message_res(set(messages))
