"""What a SuperNode of the HTTP line says to a SuperLink, without the SuperNode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

CallFailed = httpx.HTTPError
"""The exception of a refused call."""


@contextmanager
def speaking(port: int, key: ec.EllipticCurvePrivateKey, ca: Path | None = None) -> Iterator[Any]:
    """The Fleet API of this machine's SuperLink at that port, asked with that key; without `ca` without TLS."""
    interceptors = (
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(key, key.public_key()),
    )
    root = ca.read_bytes() if ca else None
    with FleetHttpClient.from_server_address(f"localhost:{port}", ca is None, root, interceptors) as client:
        yield client


def refusal(error: Any) -> tuple[bool, str]:
    """True if the call was refused because of who makes it; and the reason that was given."""
    answer = error.response
    said = answer.json().get("detail") if answer.headers["content-type"].endswith("json") else answer.text
    return answer.status_code == httpx.codes.UNAUTHORIZED, str(said)


def pusher(stub: Any, node: Node, run: int, answer: Any) -> Callable[[str, bytes], None]:
    """What pushes a part of a message; `answer` came to the message itself."""
    return make_push_object_fn_protobuf(stub.PushObject, node, run, answer.session_id)


def new_run(state: LinkState) -> int:
    """A run in a SuperLink's state."""
    return state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)


def answers(state: LinkState, run: int, messages: Sequence[str]) -> Sequence[Message]:
    """The answers that a SuperLink's state has to these messages of the run."""
    return state.get_message_res(set(messages), run)
