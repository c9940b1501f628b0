"""Flower's own bugs that this package works around, each in a few lines that show it in the installed version.

If one fails, Flower has mended that bug: docs/upstream.md says what can go here then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message
from flwr.common.constant import SubStatus
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supernode import start_client_internal as flower
from google.protobuf.message import DecodeError

from fedclip_flwr.flower import lines
from tests.flower import parts, test_inbox, test_supernode
from tests.flower.test_inbox import ASKED, Stub, answer
from tests.flower.test_supernode import RUN, Site, asked

ON_GRPC = lines.line() is lines.GRPC


class ForeverError(BaseException):
    """Flower waits again, and nothing will change: it catches whatever else is raised."""


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's pauses take no time, and there are few of them."""
    left = iter(range(20))

    def pause(seconds: float) -> None:
        if next(left, None) is None:
            raise ForeverError

    monkeypatch.setattr(vars(flower)["time"], "sleep", pause)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    """A SuperNode's state, with Flower's own functions."""
    monkeypatch.setattr(test_supernode, "take", flower._pull_and_store_message)
    return Site()


def send(site: Site) -> None:
    """Send the site's answer with all of its parts."""

    def missing(message: Message, tree: Any, *_: Any) -> Any:
        all_parts = {part.object_id for part in iterate_object_tree(tree)}
        return all_parts if ON_GRPC else (all_parts, "session")

    flower._push_messages(state=site.state, object_store=site.store, send=missing, push_object=lambda *_: None)


@pytest.mark.usefixtures("patience")
def test_a_supernode_waits_forever_for_a_process_that_has_died(site: Site) -> None:
    assert site.take(asked()) == RUN
    assert site.state.finish_task(site.begin(), SubStatus.FAILED, "killed")
    with pytest.raises(ForeverError):
        send(site)


@pytest.mark.usefixtures("patience")
def test_a_supernode_waits_forever_for_a_part_that_a_dying_process_did_not_send(site: Site) -> None:
    assert site.take(asked()) == RUN
    task = site.begin()
    site.answer(site.read(), but=1)
    assert site.state.finish_task(task, SubStatus.FAILED, "killed")
    with pytest.raises(ForeverError):
        send(site)


@pytest.mark.parametrize(
    ("fails", "kept"), [(test_supernode.broken, ON_GRPC), (test_supernode.refused, True)], ids=["unfetched", "stopped"]
)
def test_a_supernode_goes_on_with_a_message_that_it_must_not_answer(
    fails: Callable[..., Any], kept: bool, site: Site
) -> None:
    """One that it could not fetch (mended in 1.33), or whose run was stopped meanwhile."""
    taken = site.take(asked(), pull_object=fails, confirm_message_received=fails)
    assert (taken is not None or not site.empty()) == kept


def test_a_supernode_lives_on_without_its_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)

    def fails() -> bool:
        raise RuntimeError("the server answers with an error")

    sender = HeartbeatSender(fails)
    sender.start()
    sender._thread.join()
    assert len(failed) == 1


def test_an_answer_that_can_not_be_decoded_ends_the_server_app() -> None:
    with pytest.raises(DecodeError):
        list(parts.grid(test_inbox.spoilt("MetricRecord"), 3).pull_messages([ASKED]))


def test_a_server_app_reads_nothing_else_while_parts_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """For two hours, or three minutes: of Flower's pauses none takes time here."""

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return super().wait(0)

    monkeypatch.setattr(inflatable_utils, "threading", SimpleNamespace(Event=Event, Lock=threading.Lock))
    stub = Stub(answer())
    late = [*stub.contents][-1]

    def pull(request: Any) -> Any:
        stub.missing = {late} if stub.pulled.count(late) < 100 else set()
        return Stub.PullObject(stub, request)

    monkeypatch.setattr(stub, "PullObject", pull)
    assert len(list(parts.grid(stub, 3).pull_messages([ASKED]))) == 1
    assert stub.pulled.count(late) > 100
    assert len(stub.asked) == 1


def test_a_site_says_itself_who_has_sent_its_answer() -> None:
    stub = Stub(answer(src_node_id=99))
    stub.head.metadata.src_node_id = 7
    (reply,) = parts.grid(stub, 3).pull_messages([ASKED])
    assert reply.metadata.src_node_id == 99
