"""`fedclip server`: Flower's SuperLink, where no node can speak for another.

In Flower 1.31 a SuperNode signs each request, and the SuperLink compares the key with the node, except for the node to
activate and for the sender named in an answer. So anyone who knows a site's public key could activate that site's
node and learn its number: the SuperLink would reject the real node, and rounds would wait for it.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import grpc
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,  # activates a node: the named key is compared
    PushMessagesRequest,  # answers: the named node is compared
    RegisterNodeFleetRequest,  # registers a node: the named key is compared
)
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import (
    NodeAuthServerInterceptor,  # checks signatures: a SuperLink accepts no custom interceptor
)


def start(options: Sequence[str]) -> NoReturn:
    """Replace this process by a SuperLink with these options."""
    command = [sys.executable, "-P", "-m", __name__, *options]
    os.execve(command[0], command, dict(os.environ))


def owned(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Flower's handler of a request signed with a key: it refuses requests for another node."""

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
    """The reason to refuse this request of a node with that key; None if it is allowed."""
    if isinstance(request, ActivateNodeRequest | RegisterNodeFleetRequest) and request.public_key != key:
        return "this public key belongs to another node"
    if isinstance(request, PushMessagesRequest):
        senders = {message.metadata.src_node_id for message in request.messages_list}
        if senders != {request.node.node_id}:
            return "this answer is from another node"
    return None


def main() -> None:
    from flwr.server.app import run_superlink  # the command as a function, imported after the patch

    interceptor: Any = NodeAuthServerInterceptor
    interceptor._wrap_method_handler = owned(interceptor._wrap_method_handler)
    sys.argv[0] = "flower-superlink"
    run_superlink()


if __name__ == "__main__":
    main()
