"""What really travels between a site and the server: captured bytes with TLS, and whole messages without."""

from __future__ import annotations

import socket
import ssl
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import pytest
from flwr.app import Message, MessageType
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from deploy.processes import SuperLink, superlink, supernode
from deploy.relay import Streams, relayed
from fedclip_flwr.exchange.records import may_leave
from fedclip_flwr.features.base import Features
from fedclip_flwr.flower import lines
from fedclip_flwr.learning.adapters import make_adapter, tensor_names
from fedclip_flwr.operations import keys, simulation

pytestmark = pytest.mark.federation

calls_of: Any = import_module(f"tests.traffic_{lines.line().name}")
"""How calls travel on the installed line of Flower."""
SITE, ROUNDS = "art-0", 1
ADAPTER = make_adapter("attention", 128).state_dict()
NAMES = [name.encode() for name in (SITE, *ADAPTER, "num-examples", "ArrayRecord", calls_of.FLEET)]
"""What can be read of a run in its bytes, if they can be read."""
BYTES = sum(tensor.nbytes for tensor in ADAPTER.values())
HANDSHAKE, APPLICATION, KINDS = 22, 23, {20, 21, 22, 23}
OLD = (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2)
HELLO, SERVER_HELLO, ALPN, SUPPORTED_VERSIONS = 1, 2, 16, 43
TLS12, TLS13 = 0x0303, 0x0304


def run(link: SuperLink, port: int) -> None:
    """A run with one site, which reaches the SuperLink through that port."""
    settings = {"num-server-rounds": ROUNDS, "results-dir": str(link.folder / "results")}
    with supernode(link, SITE, f"site='{SITE}' partition-id=0 num-partitions=1", port=port):
        assert simulation.submit(simulation.CONNECTION, settings, link.env, link.folder) == 0


# With TLS


class Recorded(NamedTuple):
    """The connections of a run with TLS; and the version that the SuperLink agrees on with clients that know no more
    than some other."""

    connections: list[Streams]
    versions: dict[ssl.TLSVersion, str | None]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, drawn: Features) -> Recorded:
    place = tmp_path_factory.mktemp("tls")
    keys.make(place / "keys", "localhost", [SITE])
    with superlink(place / "flower", place / "keys") as link:
        link.register(SITE)
        with relayed(link.fleet, keep=True) as relay:
            run(link, relay.port)
        versions = {most: agreed(link.fleet, most) for most in OLD}
        return Recorded([streams for streams in relay.kept if streams.sent], versions)


def client(most: ssl.TLSVersion) -> ssl.SSLContext:
    """Somebody who knows no later version, and is content with anything."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, most
    return context


def agreed(port: int, most: ssl.TLSVersion) -> str | None:
    """The version that the server agrees on with that client; None where it hangs up."""
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        try:
            with client(most).wrap_socket(plain) as secured:
                return secured.version()
        except (ssl.SSLError, ConnectionError):
            return None


def offers(most: ssl.TLSVersion) -> bool:
    """Whether this machine's OpenSSL lets a client say hello with that version at all."""
    down, up = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        client(most).wrap_bio(down, up).do_handshake()
    except ssl.SSLWantReadError:
        return up.read()[9:11] == most.to_bytes(2)
    except ssl.SSLError:
        return False
    raise AssertionError("nobody answered")


def records(stream: bytearray) -> Iterator[tuple[int, bytes]]:
    """The TLS records of a stream, by kind; of the last one perhaps only the beginning came."""
    at = 0
    while at + 5 <= len(stream):
        kind, version = stream[at], int.from_bytes(stream[at + 1 : at + 3])
        length = int.from_bytes(stream[at + 3 : at + 5])
        assert kind in KINDS
        assert version in (0x0301, TLS12)  # what is in a record's head since TLS 1.2; a first hello may say 1.0
        assert length <= 2**14 + 2048
        yield kind, bytes(stream[at + 5 : at + 5 + length])
        at += 5 + length


def extensions(hello: bytes) -> dict[int, bytes]:
    """Those of a ClientHello or ServerHello, by number."""
    at = 4 + 2 + 32
    at += 1 + hello[at]  # the session
    if hello[0] == HELLO:
        at += 2 + int.from_bytes(hello[at : at + 2])  # ciphers
        at += 1 + hello[at]  # compressions
    else:
        at += 2 + 1
    end, found = at + 2 + int.from_bytes(hello[at : at + 2]), {}
    at += 2
    while at < end:
        kind, length = (int.from_bytes(hello[at + i : at + i + 2]) for i in (0, 2))
        found[kind] = hello[at + 4 : at + 4 + length]
        at += 4 + length
    return found


def test_every_connection_is_tls_1_2_or_later_from_its_first_byte_to_its_last(recorded: Recorded) -> None:
    assert recorded.connections
    for streams in recorded.connections:
        (kind, hello), *sent = records(streams.sent)
        assert (kind, hello[0]) == (HANDSHAKE, HELLO)
        assert calls_of.OFFERED in extensions(hello)[ALPN]
        (kind, answer), *answered = records(streams.answered)
        assert (kind, answer[0]) == (HANDSHAKE, SERVER_HELLO)
        version = extensions(answer).get(SUPPORTED_VERSIONS, answer[4:6])
        assert int.from_bytes(version) in (TLS12, TLS13)
        travelled = sum(len(data) for kind, data in (*sent, *answered) if kind == APPLICATION)
        assert travelled > 0.99 * (len(streams.sent) + len(streams.answered)) - 4096
    assert sum(len(streams.sent) for streams in recorded.connections) > ROUNDS * BYTES  # the adapters are in there


def test_no_name_can_be_read_on_the_way(recorded: Recorded) -> None:
    for streams in recorded.connections:
        assert [name for name in NAMES if name in streams.sent or name in streams.answered] == []


def test_a_client_that_knows_no_tls_1_2_is_refused(recorded: Recorded) -> None:
    if not offers(ssl.TLSVersion.TLSv1_1):
        pytest.skip("the OpenSSL of this machine can't say hello with TLS 1.1")
    assert recorded.versions == {ssl.TLSVersion.TLSv1_1: None, ssl.TLSVersion.TLSv1_2: "TLSv1.2"}


# Without


class Pushed(NamedTuple):
    """A message that a site has sent, and the bytes of all that travelled for it."""

    message: Message
    bytes: int


class Open(NamedTuple):
    """The connections of a run without TLS, and the messages that the site has sent."""

    connections: list[Streams]
    pushed: list[Pushed]


@pytest.fixture(scope="module")
def open_run(tmp_path_factory: pytest.TempPathFactory, drawn: Features) -> Open:
    with (
        superlink(tmp_path_factory.mktemp("open") / "flower") as link,
        calls_of.middle(link.fleet) as (calls, port),
        relayed(port, keep=True) as relay,
    ):
        run(link, relay.port)
    return Open(relay.kept, pushed(calls))


def pushed(calls: list[Any]) -> list[Pushed]:
    objects = [PushObjectRequest.FromString(call.asked) for call in calls if call.method == "PushObject"]
    contents = {one.object_id: one.object_content for one in objects}
    found = []
    for call in calls:
        if call.method == "PushMessages":
            (tree,) = PushMessagesRequest.FromString(call.asked).message_object_trees
            message = inflate_object_from_contents(tree.object_id, contents, keep_object_contents=True)
            assert isinstance(message, Message)
            travelled = {part.object_id: len(contents[part.object_id]) for part in iterate_object_tree(tree)}
            found.append(Pushed(message, len(call.asked) + sum(travelled.values())))
    return found


def replies(run: Open, kind: str) -> list[Pushed]:
    return [one for one in run.pushed if one.message.metadata.message_type == kind]


def test_an_answer_to_train_is_the_adapter_and_the_listed_figures_and_nothing_else(open_run: Open) -> None:
    trained = replies(open_run, MessageType.TRAIN)
    assert len(trained) == ROUNDS
    allowed = may_leave(tensor_names("attention"), by_class=False)
    for message, travelled in trained:
        assert message.content.keys() == {"metrics", "arrays"}
        assert message.content["metrics"].keys() == allowed["metrics"]
        arrays = message.content.array_records["arrays"]
        shapes = {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}
        assert shapes == {name: ("float32", tuple(tensor.shape)) for name, tensor in ADAPTER.items()}
        figures = message.content.metric_records["metrics"]
        assert all(isinstance(value, int | float) for figure in figures.values() for value in flat(figure))
        assert BYTES < travelled < 1.05 * BYTES


def flat(figure: object) -> list[object]:
    return figure if isinstance(figure, list) else [figure]


def test_nothing_else_is_sent_but_who_the_site_is_and_its_figures(open_run: Open) -> None:
    allowed = may_leave(tensor_names("attention"), by_class=False)
    kinds = [one.message.metadata.message_type for one in open_run.pushed]
    assert sorted(kinds) == sorted([MessageType.QUERY, *[MessageType.TRAIN] * ROUNDS, MessageType.EVALUATE])
    for kind, record in ((MessageType.QUERY, "hello"), (MessageType.EVALUATE, "metrics")):
        ((message, travelled),) = replies(open_run, kind)
        assert message.content.keys() == {record}
        assert message.content[record].keys() == allowed[record]
        assert travelled < 4096


def test_without_tls_every_name_can_be_read(open_run: Open) -> None:
    """So that finding none with TLS says something."""
    everything = b"".join(stream for streams in open_run.connections for stream in streams)
    assert [name for name in NAMES if name not in everything] == []
