"""What an outsider reaches on a real SuperLink of the HTTP line, and what Flower's own gives away.

Flower has one port for all of its APIs; `fedclip server` has one for each. The requests are the same for both.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from deploy.processes import SuperLink, superlink
from fedclip_flwr.base import UserError
from fedclip_flwr.flower import lines, superlink_http
from fedclip_flwr.flower.connections import VERSION
from fedclip_flwr.operations import keys
from tests.flower.stock import stock

MINE = public_key_to_bytes(generate_key_pairs()[1])
NEVER = {
    "/v1/control/register-node": RegisterNodeRequest(public_key=MINE),
    "/v1/control/list-nodes": ListNodesRequest(),
    "/v1/control/list-runs": ListRunsRequest(),
    "/v1/control/start-run": StartRunRequest(),
    "/v1/runtime/acquire-task": AcquireTaskRequest(supported_task_types=["flwr-serverapp"]),
}
"""What no other machine may ask."""
SIGNED = {
    "/v1/fleet/register-node": RegisterNodeFleetRequest(public_key=MINE),
    "/v1/fleet/pull-messages": PullMessagesRequest(node=Node(node_id=5)),
    "/v1/fleet/push-messages": PushMessagesRequest(node=Node(node_id=5)),
}
"""What only a registered node may ask."""


class Outsider:
    """Somebody who has nothing but the authority's certificate."""

    def __init__(self, ca: Path) -> None:
        self._client = httpx.Client(verify=ssl.create_default_context(cafile=ca), timeout=60)

    def status(self, port: int, path: str, request: Any, *, scheme: str = "https", **headers: str) -> int:
        return self._client.post(
            f"{scheme}://localhost:{port}{path}",
            content=request.SerializeToString(),
            headers={"content-type": PROTOBUF_MEDIA_TYPE, **headers},
        ).status_code


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("apart")
    keys.make(place / "keys", server="localhost", sites=["north"])
    return place


@pytest.fixture(scope="module")
def link(place: Path) -> Iterator[SuperLink]:
    with superlink(place / "link", place / "keys") as link:
        link.register("north")
        yield link


@pytest.fixture(scope="module")
def outsider(place: Path) -> Outsider:
    return Outsider(place / "keys" / "server" / "ca.crt")


@pytest.mark.federation
@pytest.mark.parametrize("path", NEVER)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "a/b?c=", "localhost/v1/control/"])
def test_sites_reach_no_other_api_than_theirs(link: SuperLink, outsider: Outsider, path: str, host: str) -> None:
    """Whatever proxy is in between: what it forwards comes to a port on which nothing else is served."""
    more = {"host": host, "x-forwarded-for": "127.0.0.1", "x-forwarded-host": "127.0.0.1", "forwarded": "for=127.0.0.1"}
    for given in (path, path.replace("/v1", "/v1/fleet/../../v1"), "/" + path, path + "/", path.upper()):
        assert outsider.status(link.fleet, given, NEVER[path], **more) == 404


@pytest.mark.federation
@pytest.mark.parametrize("path", SIGNED)
def test_a_request_without_a_signature_is_refused(link: SuperLink, outsider: Outsider, path: str) -> None:
    for host in ("localhost", "a/b?c=", "x#"):
        assert outsider.status(link.fleet, path, SIGNED[path], host=host) == 401


@pytest.mark.federation
def test_tasks_are_given_only_to_who_knows_the_secret(link: SuperLink, outsider: Outsider) -> None:
    """Also on this machine, where others can reach the port, or a proxy that was meant for something else."""
    acquire = "/v1/runtime/acquire-task"
    assert outsider.status(link.apps, acquire, NEVER[acquire], scheme="http") == 401
    for path in (path for path in NEVER if "control" in path):
        assert outsider.status(link.apps, path, NEVER[path], scheme="http") == 404


@pytest.mark.federation
def test_only_the_servers_port_for_sites_is_open_to_other_machines(link: SuperLink) -> None:
    ours = {f"{port:04X}": name for name, port in (("control", link.control), ("apps", link.apps))}
    listening = [line.split()[1].split(":") for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert {(address, ours[port]) for address, port in listening if port in ours} == {
        ("0100007F", "control"),
        ("0100007F", "apps"),
    }


@pytest.mark.federation
def test_a_request_that_is_too_large_is_not_read(link: SuperLink, place: Path) -> None:
    trust = ssl.create_default_context(cafile=place / "keys" / "server" / "ca.crt")
    large, unknown = ("content-length", superlink_http.LARGEST + 1), ("transfer-encoding", "chunked")
    for header, status in ((large, 413), (unknown, 411)):
        connection = http.client.HTTPSConnection("localhost", link.fleet, context=trust)
        connection.putrequest("POST", "/v1/fleet/pull-messages")
        connection.putheader(*map(str, header))
        connection.endheaders()
        assert connection.getresponse().status == status
        connection.close()


@pytest.mark.federation
def test_with_flowers_own_superlink_an_outsider_gets_all_of_it(place: Path, outsider: Outsider) -> None:
    """The reason for separate ports: if this fails, Flower has mended it, and `superlink_http` may go."""
    with stock(place / "stock", place / "keys") as link:
        found = {path: outsider.status(link.fleet, path, request) for path, request in NEVER.items()}
    assert found == {**dict.fromkeys(NEVER, 200), "/v1/control/start-run": 500}  # which fails because it has no app


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--control-api-address", "0.0.0.0:9093"],
            "--control-api-address 0.0.0.0:9093: anyone who reaches it can start",
        ),
        (["--serverappio-api-address=[::]:9091"], "an address of this machine only, such as 127.0.0.1:9091"),
        (["--control-api-address", "192.0.2.7:9093"], "reach it from elsewhere by `ssh -L`"),
        (["--host", "0.0.0.0", "--port=8000"], "--host and --port: each API has its own address here"),
        (["--fleet-api-address", "9092"], "--fleet-api-address '9092': expected HOST:PORT, such as 0.0.0.0:9092"),
        (["--control-api-address", "fl.example.org:9093"], "give an address of this machine only"),
    ],
)
def test_addresses_that_open_more_than_the_sites_api_are_refused(options: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        superlink_http.check(options)
    assert expected in str(error.value)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "localhost:9", "[::1]:9", "127.9.9.9:9"])
def test_addresses_of_this_machine_are_taken(address: str) -> None:
    superlink_http.check(["--insecure", "--control-api-address", address, "--serverappio-api-address", address])


def test_a_port_that_is_taken_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"--fleet-api-address {address}: can't listen there \(Address already"):
            superlink_http.bound("fleet", address)


def test_a_superlink_that_does_not_start_ends_with_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def failing() -> Any:
        raise OSError

    @asynccontextmanager
    async def fails(_: FastAPI) -> AsyncIterator[None]:
        yield await failing()

    applications = {api: FastAPI(lifespan=fails if api == "serverappio" else None) for api in superlink_http.DEFAULTS}
    monkeypatch.setattr(superlink_http, "applications", lambda _: applications)
    config = SimpleNamespace(isolation="process", ssl_keyfile=None, ssl_certfile=None)
    with pytest.raises(UserError, match="the SuperLink did not start"):
        superlink_http.run(dict.fromkeys(applications, "127.0.0.1:0"), config, tmp_path / "secret")


@pytest.mark.federation
def test_a_superlink_ends_though_somebodys_request_has_no_end(tmp_path: Path) -> None:
    with superlink(tmp_path / "link") as link, socket.create_connection(("127.0.0.1", link.fleet)) as outsider:
        head = f"Host: x\r\nContent-Type: {PROTOBUF_MEDIA_TYPE}\r\nContent-Length: 10\r\nExpect: 100-continue"
        outsider.sendall(f"POST /v1/fleet/pull-messages HTTP/1.1\r\n{head}\r\n\r\n".encode())
        assert outsider.recv(100).startswith(b"HTTP/1.1 100 ")  # it reads on, and waits for the rest
        link.process.terminate()
        link.process.wait(120)
    assert "timeout graceful shutdown exceeded" in (link.folder / "superlink.log").read_text()


def test_an_answer_in_another_name_is_refused_before_it_is_stored() -> None:
    stored: list[Any] = []
    push = superlink_http.owned(lambda request, state: stored.append(request))
    own, other = PushMessagesRequest(node=Node(node_id=5)), PushMessagesRequest(node=Node(node_id=5))
    own.messages_list.add().metadata.src_node_id = 5
    other.messages_list.add().metadata.src_node_id = 6
    push(own, None)
    with pytest.raises(HTTPException, match="this answer is from another node"):
        push(other, None)
    assert stored == [own]


def test_a_guarded_application_gets_no_large_request_and_tells_flowers_version() -> None:
    app, read = FastAPI(), []
    app.get("/health")(lambda: "up")
    app.post("/read")(lambda: read.append("all"))
    transport = httpx.ASGITransport(superlink_http.guarded(app))

    async def pieces() -> AsyncIterator[bytes]:
        yield b"of unknown length"

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            large = {"content-length": str(superlink_http.LARGEST + 1)}
            return [
                await client.get("/health"),
                await client.post("/read", headers=large),
                await client.post("/read", content=pieces()),
            ]

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200, 413, 411]
    assert {answer.headers[VERSION] for answer in answers} == {lines.installed()}
    assert not read
