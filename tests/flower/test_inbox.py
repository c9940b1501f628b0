"""Replies from a simulated SuperLink. For a real one with hostile sites: test_hostile.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)

from fedclip_flwr.exchange.records import write_adapter
from fedclip_flwr.flower import inbox
from fedclip_flwr.flower.inbox import Inbox
from tests.flower import parts

MOST = 100_000
ASKED = "a" * 64


class Stub:
    """A SuperLink to which one reply has come, of which some parts may still be missing."""

    def __init__(self, reply: Message) -> None:
        self.head = message_to_proto(remove_content_from_message(reply))
        self.head.metadata.message_id = reply.object_id
        self.tree = get_object_tree(reply)
        self.contents = {key: part.deflate() for key, part in get_all_nested_objects(reply).items()}
        self.missing: set[str] = set()
        self.pulled: list[str] = []
        self.confirmed: list[str] = []
        self.asked: list[set[str]] = []
        self.announced = False

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        self.asked.append({*request.message_ids})
        if self.announced or ASKED not in request.message_ids:
            return parts.PullAppMessagesResponse()
        self.announced = True
        return parts.PullAppMessagesResponse(messages_list=[self.head], message_object_trees=[self.tree])

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        self.pulled.append(request.object_id)
        if request.object_id in self.missing:
            return PullObjectResponse(object_found=True, object_available=False)
        return PullObjectResponse(
            object_found=True, object_available=True, object_content=self.contents[request.object_id]
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


def answer(content: RecordDict | None = None, **metadata: Any) -> Message:
    content = content or RecordDict({"arrays": write_adapter({"w": torch.ones(3)}), "metrics": MetricRecord({"n": 1})})
    asked = Message(RecordDict(), 7, MessageType.TRAIN)
    asked.metadata.__dict__.update(_message_id=ASKED, _run_id=3, _src_node_id=1)
    reply = Message(content, reply_to=asked)
    reply.metadata.__dict__.update({f"_{key}": value for key, value in metadata.items()})
    return reply


def opened(stub: Any, run: int = 3) -> Inbox:
    return Inbox(parts.grid(stub, run))


def test_a_reply_comes_as_it_was_sent() -> None:
    stub = Stub(answer())
    ((reply, _),) = opened(stub).take([ASKED], MOST)
    assert reply.metadata.reply_to_message_id == ASKED
    assert reply.metadata.src_node_id == 7
    assert reply.content.array_records["arrays"]["w"].numpy().tolist() == [1, 1, 1]
    assert stub.confirmed == [stub.head.metadata.message_id]


def test_a_reply_whose_parts_are_not_all_there_is_waited_for_without_holding_up_others() -> None:
    stub = Stub(answer())
    box, late = opened(stub), [*stub.contents][-1]
    stub.missing = {late}
    assert list(box.take([ASKED], MOST)) == []
    assert list(box.take([ASKED], MOST)) == []
    stub.missing.clear()
    ((reply, _),) = list(box.take([ASKED], MOST))
    assert not reply.has_error()
    assert all(stub.pulled.count(part) == 1 for part in stub.contents if part != late)
    assert list(box.take([ASKED], MOST)) == []


def test_a_reply_that_is_given_up_while_parts_are_missing_is_confirmed() -> None:
    stub = Stub(answer())
    box = opened(stub)
    stub.missing = {*stub.contents}
    assert list(box.take([ASKED], MOST)) == []
    box.give_up([ASKED])
    assert stub.confirmed == [stub.head.metadata.message_id]
    questions = len(stub.asked)
    box.give_up([])
    assert len(stub.asked) == questions  # it is no longer listened for
    stub.missing.clear()
    assert list(box.take([ASKED], MOST)) == []


def test_a_reply_that_is_not_asked_for_this_time_is_not_lost() -> None:
    """As a hello whose parts are still missing when a round begins."""
    stub = Stub(answer())
    box = opened(stub)
    stub.missing = {*stub.contents}
    assert list(box.take([ASKED], MOST)) == []
    assert list(box.take([], MOST)) == []
    stub.missing.clear()
    assert list(box.take([], MOST)) == []
    assert len(list(box.take([ASKED], MOST))) == 1


def test_of_messages_without_an_answer_only_the_latest_are_still_listened_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "MOST_GIVEN_UP", 2)
    stub = Stub(answer())
    box = opened(stub)
    box.give_up(["1", "2"])
    box.give_up(["3"])
    assert stub.asked == [{"1", "2"}, {"2", "3"}]


class RealLink(parts.Link):  # type: ignore[misc]
    """A SuperLink with a node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.node = self.state.create_node(NOOP_FLWR_AID, "", b"key", 30.0)
        assert self.state.activate_node(self.node, 30.0)

    def answer(self, number: int, parts: int | None = None) -> None:
        """The node takes its message and answers, with all parts or so many of them."""
        (asked,) = self.state.get_message_ins(self.node, 1)
        self.store.delete(asked.metadata.message_id)  # as it confirms that it has the message
        reply = Message(RecordDict({"n": MetricRecord({"n": number})}), reply_to=asked)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        contents = {key: part.deflate() for key, part in get_all_nested_objects(reply).items()}
        self.push(message_to_proto(remove_content_from_message(reply)), reply, dict([*contents.items()][:parts]))


@pytest.mark.parametrize("count", [None, 1], ids=["whole", "in part"])
def test_a_superlink_keeps_nothing_of_an_answer_that_comes_late(
    count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = RealLink(monkeypatch)
    box = opened(link, link.run)
    grid: Any = box._grid
    keys = grid.push_messages([Message(RecordDict(), link.node, MessageType.TRAIN) for _ in range(2)])
    assert list(box.take(keys[:1], MOST)) == []
    box.give_up(keys[:1])
    link.answer(1, count)
    link.answer(2)
    ((reply, _),) = list(box.take(keys[1:], MOST))
    assert reply.content["n"]["n"] == 2
    assert len(link.store) > 0
    box.give_up([])
    assert len(link.store) == link.state.num_message_ins() == link.state.num_message_res() == 0


def test_who_sent_it_is_what_the_superlink_says() -> None:
    stub = Stub(answer(src_node_id=99, reply_to_message_id="b" * 64))
    stub.head.metadata.src_node_id, stub.head.metadata.reply_to_message_id = 7, ASKED
    ((reply, _),) = opened(stub).take([ASKED], MOST)
    assert (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) == (7, ASKED)


def test_too_much_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(answer(RecordDict({str(n): write_adapter({"w": torch.rand(5000)}) for n in range(50)})))
    ((reply, _),) = opened(stub).take([ASKED], MOST)
    assert "bytes, expected at most 100,000" in str(reply.error.reason)
    assert len(stub.pulled) < len(stub.contents) / 2
    monkeypatch.setattr(inbox, "MOST_PARTS", 3)
    stub = Stub(answer())
    ((reply, _),) = opened(stub).take([ASKED], MOST)
    assert "parts, expected at most 3" in str(reply.error.reason)
    assert not stub.pulled


def test_what_names_one_thing_many_times_counts_as_often() -> None:
    same = write_adapter({"w": torch.ones(200)})["w"]
    stub = Stub(answer(RecordDict({"arrays": ArrayRecord({f"{n:030}": same for n in range(200)})})))
    assert sum(map(len, stub.contents.values())) < MOST
    ((reply, _),) = opened(stub).take([ASKED], MOST)
    assert "bytes, expected at most 100,000" in str(reply.error.reason)
    assert stub.confirmed


def spoilt(way: str) -> Stub:
    """A reply that is not what it should be, with parts that have the names of their contents."""
    reply = answer()
    parts = get_all_nested_objects(reply)
    kinds = {type(part).__name__: key for key, part in parts.items()}
    stub = Stub(reply)
    if way in kinds:
        stub.contents[kinds[way]] = add_header_to_object_body(b"\xff\x00garbage", parts[kinds[way]])
    elif way in ("shape", "surrogate"):
        facts: dict[str, Any] = {"dtype": "float32", "shape": [3], "stype": "numpy.ndarray", "arraychunk_ids": [0]}
        facts["shape" if way == "shape" else "dtype"] = [10**30] if way == "shape" else "\ud800"
        stub.contents[kinds["Array"]] = add_header_to_object_body(json.dumps(facts).encode(), parts[kinds["Array"]])
    elif way == "no head":
        stub.contents[kinds["MetricRecord"]] = b"garbage"
    elif way == "no message":
        record = ConfigRecord({"a": 1})
        key = get_object_id(record.deflate())
        stub.head.metadata.message_id, stub.tree, stub.contents = key, get_object_tree(record), {key: record.deflate()}
    elif way == "no record":
        wrong: Any = ArrayRecord({})
        stub.contents[reply.object_id] = stub.contents[reply.object_id].replace(
            reply.content.object_id.encode(), wrong.object_id.encode()
        )
        stub.contents[wrong.object_id] = wrong.deflate()
        stub.tree.children[0].CopyFrom(get_object_tree(wrong))
    return stub


@pytest.mark.parametrize(
    "way",
    [
        *("Message", "RecordDict", "ArrayRecord", "MetricRecord", "Array"),
        *("no head", "no message", "no record", "shape", "surrogate"),
    ],
)
def test_what_can_not_be_put_together_is_an_error_of_that_site(way: str) -> None:
    ((reply, _),) = opened(spoilt(way)).take([ASKED], MOST)
    assert reply.has_error()
    assert "its answer can't be decoded" in str(reply.error.reason)
    assert "\n" not in str(reply.error.reason)
    assert reply.metadata.src_node_id == 7


def failing(error: type[Exception]) -> Any:
    stub: Any = Stub(answer())
    stub.PullObject = lambda request: (_ for _ in ()).throw(error())
    return stub


def test_a_superlink_that_is_gone_is_not_the_sites_fault() -> None:
    with pytest.raises(parts.GoneError):
        list(opened(failing(parts.GoneError)).take([ASKED], MOST))


def test_an_answer_that_flower_can_not_bring_is_an_error_of_that_site() -> None:
    ((reply, _),) = opened(failing(parts.LargeError)).take([ASKED], MOST)
    assert reply.error.reason == "its answer is too large to fetch"
