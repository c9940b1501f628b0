"""The calls of a site as they travel over gRPC, seen by a man in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import grpc
from flwr.proto import fleet_pb2

FLEET, OFFERED = "flwr.proto.Fleet", b"\x02h2"
"""What stands in each call; what a site offers to speak within TLS."""


class Call(NamedTuple):
    """A call of the Fleet API and what was asked, as it travelled."""

    method: str
    asked: bytes


@contextmanager
def middle(port: int) -> Iterator[tuple[list[Call], int]]:
    """A man in the middle, who passes every call on: the calls, complete at the end, and where he listens."""
    calls: list[Call] = []
    (fleet,) = fleet_pb2.DESCRIPTOR.services_by_name.values()
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    server = grpc.server(ThreadPoolExecutor(8))

    def handler(method: str) -> grpc.RpcMethodHandler:
        ask = channel.unary_unary(f"/{fleet.full_name}/{method}")

        def pass_on(asked: bytes, context: grpc.ServicerContext) -> bytes:
            calls.append(Call(method, asked))
            metadata = [(key, value) for key, value in context.invocation_metadata() if key != "user-agent"]
            answer: bytes = ask(asked, metadata=metadata)
            return answer

        return grpc.unary_unary_rpc_method_handler(pass_on)

    handlers = {method.name: handler(method.name) for method in fleet.methods}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(fleet.full_name, handlers)])
    own = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield calls, own
    finally:
        server.stop(None).wait()
        channel.close()
