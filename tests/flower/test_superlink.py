"""A real SuperLink, to which some speak in another site's name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from deploy.processes import SuperLink, superlink
from fedclip_flwr.flower import lines
from fedclip_flwr.flower.superlink import objection
from fedclip_flwr.operations import certificates, keys, simulation
from harness.fleet import speaking
from harness.machine import processes
from tests.flower.stock import stock
from tests.flower.test_inbox import Stub, answer


class Speaker:
    """Whoever has a site's keys, and speaks to the SuperLink with them."""

    def __init__(self, ask: Any, public: bytes) -> None:
        self.ask, self.public = ask, public

    def activate(self, public: bytes) -> int:
        return int(self.ask.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30)).node_id)


@contextmanager
def speaker(link: SuperLink, site: str) -> Iterator[Speaker]:
    assert link.keys
    own = link.keys / "sites" / site
    key = certificates.node_key(own / "node.key")
    with speaking.speaking(link.fleet, key, own / "ca.crt") as ask:
        yield Speaker(ask, public_key_to_bytes(key.public_key()))


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
    with speaker(link, "north") as north, speaker(link, "south") as south, speaker(link, "stranger") as stranger:
        for who in (south, stranger):
            with pytest.raises(speaking.CallFailed) as refused:
                who.activate(north.public)
            assert speaking.refusal(refused.value)[0]
        assert link.online() == 0
        assert north.activate(north.public)
        assert link.online() == 1


@pytest.mark.federation
def test_nobody_can_answer_in_another_sites_name(link: SuperLink) -> None:
    with speaker(link, "south") as south:
        own = south.activate(south.public)
        with pytest.raises(speaking.CallFailed) as refused:
            south.ask.PushMessages(pushed(own, own + 1))
    assert speaking.refusal(refused.value) == (True, "this answer is from another node")


@pytest.mark.federation
def test_with_flowers_own_superlink_one_can(link: SuperLink, tmp_path: Path) -> None:
    """The reason for `objection`: if this fails, Flower has mended it. docs/upstream.md."""
    assert link.keys
    with stock(tmp_path / "stock", link.keys) as own, speaker(own, "south") as south, speaker(own, "north") as north:
        own.register("north", "south")
        if lines.line() is lines.GRPC:  # mended since
            assert south.activate(north.public)
        node = south.activate(south.public)
        other = Stub(answer(src_node_id=node + 1))
        request = PushMessagesRequest(
            node=Node(node_id=node), messages_list=[other.head], message_object_trees=[other.tree]
        )
        with pytest.raises(speaking.CallFailed) as failed:
            south.ask.PushMessages(request)
    assert not speaking.refusal(failed.value)[0]  # it looked for that answer's run, which does not exist


@pytest.mark.federation
def test_a_superlink_ends_if_what_starts_its_runs_has_ended(tmp_path: Path) -> None:
    """So that whoever starts it again does so: Flower's own stays, and starts no run."""
    with superlink(tmp_path / "link") as link:
        while not (found := processes("flower-superexec", f"FLWR_HOME={link.folder}")):
            assert link.process.poll() is None
            time.sleep(0.1)
        os.kill(found[0], signal.SIGKILL)
        assert link.process.wait(120) == 1
    assert "flower-superexec exited: stopping this SuperLink" in (link.folder / "superlink.log").read_text()


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
