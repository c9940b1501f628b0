"""A real SuperLink, to which some speak in another site's name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.message_pb2 import Message
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from deploy.processes import SuperLink, superlink
from fedclip_flwr.flower.superlink import objection
from fedclip_flwr.operations import keys, simulation


class Speaker:
    """Whoever has a site's keys, and speaks to the SuperLink with them."""

    def __init__(self, link: SuperLink, site: str) -> None:
        assert link.keys
        own = link.keys / "sites" / site
        private: Any = load_ssh_private_key((own / "node.key").read_bytes(), None)
        credentials = grpc.ssl_channel_credentials((own / "ca.crt").read_bytes())
        channel = grpc.secure_channel(f"localhost:{link.fleet}", credentials)
        signing = NodeAuthClientInterceptor(private, private.public_key())
        self.public = public_key_to_bytes(private.public_key())
        self.ask: Any = FleetStub(grpc.intercept_channel(channel, signing))

    def activate(self, public: bytes) -> int:
        return int(self.ask.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30)).node_id)


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    place = tmp_path_factory.mktemp("owned")
    keys.make(place / "keys", server="localhost", sites=["north", "south", "stranger"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(simulation, "stop_in_order", lambda word: None)
        with superlink(place / "link", place / "keys") as link:
            link.register("north", "south")
            yield link


@pytest.mark.federation
def test_nobody_can_be_there_in_another_sites_name(link: SuperLink) -> None:
    north, stranger = Speaker(link, "north"), Speaker(link, "stranger")
    for who in (Speaker(link, "south"), stranger):
        with pytest.raises(grpc.RpcError) as refused:
            who.activate(north.public)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert refused.value.details() == "this public key belongs to another node"
    assert link.online() == 0
    assert north.activate(north.public)
    assert link.online() == 1


@pytest.mark.federation
def test_nobody_can_answer_in_another_sites_name(link: SuperLink) -> None:
    south = Speaker(link, "south")
    own = south.activate(south.public)
    answer = Message()
    answer.metadata.src_node_id = own + 1
    with pytest.raises(grpc.RpcError) as refused:
        south.ask.PushMessages(PushMessagesRequest(node=Node(node_id=own), messages_list=[answer]))
    assert refused.value.details() == "this answer is from another node"


def pushed(own: int, *senders: int) -> PushMessagesRequest:
    """Messages of these nodes, which the node `own` sends."""
    request = PushMessagesRequest(node=Node(node_id=own))
    for sender in senders:
        request.messages_list.add().metadata.src_node_id = sender
    return request


@pytest.mark.parametrize("ask", [ActivateNodeRequest, RegisterNodeFleetRequest])
def test_only_the_owner_of_a_key_may_ask_with_it(ask: Any) -> None:
    assert objection(ask(public_key=b"north"), b"north") is None
    assert objection(ask(public_key=b"north"), b"south") == "this public key belongs to another node"


def test_a_node_may_send_only_its_own_messages() -> None:
    assert objection(pushed(5, 5, 5), b"north") is None
    for senders in ((6,), (5, 6), ()):
        assert objection(pushed(5, *senders), b"north") == "this answer is from another node"
