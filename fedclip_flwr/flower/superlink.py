"""Flower's SuperLink, which lets nobody speak for another node: what `fedclip server` becomes.

In Flower 1.31 a SuperNode signs all that it asks for, and the SuperLink compares the key with the node; but not where a
node is activated, and not with what an answer says of where it comes from. So whoever knew a site's public key could
mark that site's node as present, and learn its number: the real one would be turned away, and rounds would wait for it.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import grpc
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,  # a node says that it is there: whose key it names is compared
    PushMessagesRequest,  # a node answers: whose number it names is compared
    RegisterNodeFleetRequest,  # a node asks to be known: as the first
)
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import (
    NodeAuthServerInterceptor,  # checks signatures: a SuperLink takes no interceptor of its user's
)


def start(options: Sequence[str]) -> NoReturn:
    """Becomes a SuperLink with these options."""
    command = [sys.executable, "-P", "-m", __name__, *options]
    os.execve(command[0], command, dict(os.environ))


def owned(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's way to handle what a node asks for, when it has signed with this key; only for what is its own."""

    @functools.wraps(wrap)
    def wrapped(self: Any, handler: Any, key: bytes) -> Any:
        inner = wrap(self, handler, key)

        def handled(request: Any, context: Any) -> Any:
            if why := objection(request, key):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, why)
            return inner.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(
            handled, request_deserializer=inner.request_deserializer, response_serializer=inner.response_serializer
        )

    return wrapped


def objection(request: Any, key: bytes) -> str | None:
    """Why a node with that key may not ask for this."""
    if isinstance(request, ActivateNodeRequest | RegisterNodeFleetRequest) and request.public_key != key:
        return "that public key is another node's"
    if isinstance(request, PushMessagesRequest):
        senders = {message.metadata.src_node_id for message in request.messages_list}
        if senders != {request.node.node_id}:
            return "that answer is another node's"
    return None


def main() -> None:
    from flwr.server.app import run_superlink  # the command as a function, once that is mended

    interceptor: Any = NodeAuthServerInterceptor
    interceptor._wrap_method_handler = owned(interceptor._wrap_method_handler)
    sys.argv[0] = "flower-superlink"
    run_superlink()


if __name__ == "__main__":
    main()
