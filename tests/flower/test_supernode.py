"""Cases in which Flower's SuperNode would hang: its own functions and state, with a simulated server and app.

For real ones: tests/test_deploy.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.cli.build import build_fab_from_files
from flwr.common import now
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import start_client_internal as flower
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from fedclip_flwr.base import files
from fedclip_flwr.flower import pinned, supernode
from tests.flower import parts

NODE, RUN, NEW = 7, 11, 12
take = supernode.taking(flower._pull_and_store_message)
send = supernode.sending(flower._push_messages)


class Site:
    """The state of a SuperNode, and the messages that it has sent to the server."""

    def __init__(self) -> None:
        self.store = ObjectStoreFactory().store()
        self.state = InMemoryNodeState(self.store)
        self.state.set_node_id(NODE)
        self.state.store_run(parts.Run.create_empty(RUN))
        self.sent: list[Message] = []

    def take(self, message: Message, **unlike: Callable[..., Any]) -> int | None:
        """The message is offered, and fetched unless one of the server's answers is `unlike` that."""
        contents = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
        ways: dict[str, Callable[..., Any]] = {
            "receive": lambda: (remove_content_from_message(message), get_object_tree(message)),
            "get_run": lambda run: pytest.fail("the run is known"),
            "get_fab": lambda *_: pytest.fail("the run is known"),
            "pull_object": lambda run, key: contents[key],
            "confirm_message_received": lambda run, key: None,
        }
        own: dict[str, Any] = {"node_config": {}, "trusted_entities": None, **ways, **unlike}
        return take(state=self.state, object_store=self.store, **own)

    def send(self) -> threading.Thread:
        """The SuperNode waits for an answer and sends it, meanwhile."""

        def sent(message: Message, *_: Any) -> set[str]:
            self.sent.append(message)
            return set()

        connection = {"send": sent, "push_object": lambda *_: None}
        whole = {"state": self.state, "object_store": self.store, **connection}
        sender = threading.Thread(target=send, kwargs=whole, daemon=True)
        sender.start()
        return sender

    def begin(self) -> int:
        """The app's process begins: its task."""
        (task,) = self.state.get_tasks(statuses=supernode.UNFINISHED)
        assert self.state.claim_task(task.task_id)
        assert self.state.activate_task(task.task_id)
        return task.task_id

    def read(self) -> Message:
        """The app's process takes the message."""
        message: Message = parts.read(self.state, RUN)
        self.state.record_message_processing_start(message.metadata.message_id)
        self.store.delete(message.metadata.message_id)
        return message

    def answer(self, message: Message, but: int = 0) -> None:
        """The app's process gives its answer, and all parts of it but so many."""
        reply = Message(RecordDict({"metrics": ConfigRecord({"accuracy": 0.5})}), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        parts = get_all_nested_objects(reply)
        self.state.record_message_processing_end(message.metadata.message_id)
        self.store.preregister(RUN, get_object_tree(reply))
        self.state.store_message(remove_content_from_message(reply))
        for key, part in list(parts.items())[: len(parts) - but]:
            self.store.put(key, part.deflate())

    def empty(self) -> bool:
        return not (self.state.msg_store or len(self.store) or self.state.get_tasks(statuses=supernode.UNFINISHED))


def asked(text: str = "", run: int = RUN) -> Message:
    """A message of the server's."""
    metadata = Metadata(run, "", 1, NODE, "", "", now().timestamp(), 60.0, "train")
    message = make_message(metadata, RecordDict({"config": ConfigRecord({"text": text})}))
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def refused(*_: Any) -> NoReturn:
    """As Flower does once the server has said that the run is over."""
    raise parts.RunNotRunningException


def broken(*_: Any) -> NoReturn:
    raise OSError("no such object")


@pytest.fixture
def site() -> Site:
    return Site()


def test_an_answer_is_sent_when_the_work_is_over(site: Site) -> None:
    message = asked()
    assert site.take(message) == RUN
    task = site.begin()
    site.answer(site.read())
    sender = site.send()
    assert not site.sent  # parts of the answer may still be missing
    assert site.state.finish_task(task, SubStatus.COMPLETED, "")
    sender.join(20)
    (sent,) = site.sent
    assert sent.metadata.reply_to_message_id == message.metadata.message_id
    assert not sent.has_error()
    assert site.empty()


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    "unlike",
    [{"pull_object": broken}, {"pull_object": refused, "confirm_message_received": refused}],
    ids=["it can't be fetched", "its run is over"],
)
def test_a_message_that_is_not_to_be_answered_is_forgotten(
    unlike: dict[str, Callable[..., Any]], begun: bool, site: Site
) -> None:
    """And the next one is answered as if it had not been."""

    def fetched(*_: Any) -> Any:
        if begun and not site.state.task_token_store:
            site.begin()  # Flower has its process started while the message is still being fetched
        return unlike["pull_object"]()

    assert site.take(asked("first"), **(unlike | {"pull_object": fetched})) is None
    assert site.empty()
    message = asked("second")
    assert site.take(message) == RUN
    task = site.begin()
    site.answer(site.read())
    assert site.state.finish_task(task, SubStatus.COMPLETED, "")
    site.send().join(20)
    assert [sent.metadata.reply_to_message_id for sent in site.sent] == [message.metadata.message_id]


@pytest.mark.parametrize("killed", ["before it takes the message", "at work", "while it answers"])
def test_a_process_that_dies_is_reported(killed: str, site: Site) -> None:
    message = asked()
    assert site.take(message) == RUN
    task = site.begin()
    if killed != "before it takes the message":
        taken = site.read()
        if killed == "while it answers":
            site.answer(taken, but=1)
    site.state.task_token_store[task].active_until = now() - timedelta(seconds=1)  # it no longer says that it lives
    site.send().join(20)
    (sent,) = site.sent
    assert sent.metadata.reply_to_message_id == message.metadata.message_id
    assert sent.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert site.empty()


def test_a_run_with_the_installed_app_is_taken(site: Site) -> None:
    names = (*pinned.APPS, pinned.DESCRIBED)
    bundle, _ = build_fab_from_files({name: files.own_app() / name for name in names})
    fab = parts.Fab("", bundle, {})
    assert site.take(asked(run=NEW), get_run=parts.Run.create_empty, get_fab=lambda *_: fab) == NEW
    assert site.state.get_run(NEW)
    (task,) = site.state.get_tasks(statuses=supernode.UNFINISHED)
    assert task.run_id == NEW


def test_a_run_with_another_app_is_refused_before_anything_of_it_is_read_or_kept(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower, "get_fused_config_from_fab", lambda *_: pytest.fail("it is unpacked"))
    message = asked(run=NEW)
    fab = parts.Fab("its hash", b"another app", {})
    assert site.take(message, get_run=parts.Run.create_empty, get_fab=lambda *_: fab) == NEW
    assert not site.state.get_run(NEW)
    assert not site.state.get_fab("its hash")
    assert not site.state.get_tasks(statuses=supernode.UNFINISHED)
    site.send().join(20)
    (sent,) = site.sent
    assert sent.metadata.reply_to_message_id == message.metadata.message_id
    assert "install the same version of fedclip-flwr" in str(sent.error.reason)
    assert str(sent.error.reason) in caplog.text
    assert site.empty()


def test_when_there_is_nothing_to_take_nothing_changes(site: Site) -> None:
    assert site.take(asked(), receive=lambda: None) is None
    assert site.empty()


END = """
import signal, subprocess, sys, threading, time
from fedclip_flwr.base import content
from fedclip_flwr.flower import pinned
from fedclip_flwr.flower import supernode
from flwr.supernode import cli
def fails():
    raise RuntimeError("no heartbeat")
def stays():
    threading.Event().wait()
def played():
    print("begun", *sys.argv[1:], flush=True)
    {what}
cli.flower_supernode = played
supernode.main()
"""


@pytest.mark.parametrize(
    ("what", "status", "expected"),
    [
        ("threading.Thread(target=fails).start(); stays()", 1, "no heartbeat"),
        ("child = subprocess.Popen(['flower-superexec']); stays()", 1, "flower-superexec exited"),
        ("subprocess.run(['true']); sys.exit(threading.active_count() - 1)", 0, ""),
        ("threading.Thread(target=stays).start(); sys.exit(0)", 0, ""),
        ("threading.Thread(target=stays).start(); sys.exit('why')", 1, ""),
        ("threading.Thread(target=stays).start(); fails()", 1, "no heartbeat"),
        ("threading.Thread(target=stays).start()", 1, ""),
    ],
    ids=[
        "a thread fails",
        "its SuperExec ends",
        "another child ends",
        "expected to end",
        "for a reason",
        "it fails",
        "it returns",
    ],
)
def test_a_supernode_that_cannot_continue_ends(what: str, status: int, expected: str, tmp_path: Path) -> None:
    (tmp_path / "flower-superexec").write_text("#!/bin/sh\n")
    (tmp_path / "flower-superexec").chmod(0o755)
    command = [sys.executable, "-c", END.format(what=what), "--an", "option"]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stdout) == (status, "begun --an option\n")
    assert expected in done.stderr
