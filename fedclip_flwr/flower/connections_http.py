"""Calls to a SuperLink over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.config_utils import load_certificate_in_connection  # the commands' own checks
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE  # how far clocks may be apart
from flwr.proto.control_pb2 import ListNodesRequest  # `flwr supernode list` as a message
from flwr.proto.fleet_pb2 import ActivateNodeRequest  # a SuperNode's first message
from flwr.proto.node_pb2 import NodeInfo  # what a list of nodes holds
from flwr.supercore.control import ControlHttpClient  # where commands send
from flwr.supercore.date import now  # the clock that signs
from flwr.supercore.error import ApiErrorCode, FlowerError  # how a server refuses
from flwr.supercore.primitives.asymmetric import public_key_to_bytes  # a key, as it is sent
from flwr.supernode.fleet_http_client import FleetHttpClient  # where a SuperNode sends
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor  # signs as a SuperNode does

from fedclip_flwr.flower.connections import VERSION, CallError, ClockError, ElsewhereError


def knows(address: str, key: ec.EllipticCurvePrivateKey, ca: Path | None, patience: float) -> bool:
    answer = _activated(address, key, ca, patience)
    refused = FlowerError.from_json(answer.text)
    codes = {ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL: True, ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED: False}
    if refused is None or refused.code not in codes:
        _fail(answer)
    return codes[ApiErrorCode(refused.code)]


def version(address: str, key: ec.EllipticCurvePrivateKey, ca: Path | None, patience: float) -> str:
    return str(_activated(address, key, ca, patience).headers.get(VERSION, ""))


def nodes(connection: Any, patience: float) -> Sequence[NodeInfo]:
    root = load_certificate_in_connection(connection)
    with ControlHttpClient.from_server_address(connection.address, connection.insecure, root, ()) as client:
        client._client.timeout = httpx.Timeout(patience)
        try:
            return list(client.ListNodes(ListNodesRequest()).nodes_info)
        except httpx.HTTPStatusError as error:
            _fail(error.response)
        except (httpx.HTTPError, ValueError) as error:
            raise CallError(_words(error)) from None


def _activated(address: str, key: ec.EllipticCurvePrivateKey, ca: Path | None, patience: float) -> httpx.Response:
    """The answer to a call that should activate the node, with an invalid heartbeat interval."""
    public = key.public_key()
    request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0.0)
    signing = NodeAuthHttpInterceptor(key, public)
    root = ca.read_bytes() if ca else None
    with FleetHttpClient.from_server_address(address, ca is None, root, [signing]) as client:
        client._client.timeout = httpx.Timeout(patience)
        try:
            client.ActivateNode(request)
        except httpx.HTTPStatusError as error:
            return error.response
        except (httpx.HTTPError, ValueError) as error:
            raise CallError(_words(error)) from None
    raise CallError("it activates a node without a heartbeat")


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _fail(answer: httpx.Response) -> NoReturn:
    details = f"{answer.status_code} {' '.join(answer.text[:200].split())}"
    if answer.status_code == httpx.codes.UNAUTHORIZED and "date" in answer.headers:
        ahead = (now() - parsedate_to_datetime(answer.headers["date"])).total_seconds()
        if not -TIMESTAMP_TOLERANCE < ahead < SYSTEM_TIME_TOLERANCE:
            raise ClockError(f"this machine's clock is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}")
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise ElsewhereError(details)
    raise CallError(details)
