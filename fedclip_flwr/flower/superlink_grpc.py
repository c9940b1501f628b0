"""The SuperLink of the gRPC line: refuses requests in another node's name, and tells its version to those that ask."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from flwr.server import app  # the command, and what it starts
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import (
    NodeAuthServerInterceptor,  # checks signatures: a SuperLink accepts no custom interceptor
)

from fedclip_flwr.flower.patching import replace
from fedclip_flwr.flower.superlink import objection


def check(options: Sequence[str]) -> None:
    """All options are Flower's, which checks them."""


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


def main(options: Sequence[str]) -> None:
    replace(NodeAuthServerInterceptor, _wrap_method_handler=owned(NodeAuthServerInterceptor._wrap_method_handler))
    versions = "create_fleet_runtime_version_server_interceptor"
    replace(app, **{versions: functools.partial(vars(app)[versions], send_warning_metadata=True)})
    sys.argv = ["flower-superlink", *options]
    app.run_superlink()
