"""Flower's own parts on the HTTP line, for tests that put them together."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from flwr.app import Message
from flwr.common.constant import NOOP_FLWR_AID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.runtime_pb2 import PullAppMessagesResponse as PullAppMessagesResponse
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab as Fab
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run as Run
from flwr.supercore.run import RunNotRunningException as RunNotRunningException
from flwr.supercore.superexec.plugin import AutoExecPlugin as ExecPlugin
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from fedclip_flwr.flower import connections_http

__all__ = ["ExecPlugin"]


UNKNOWN_KEY = "Failed to activate SuperNode"
"""The words with which a SuperNode ends whose key is not registered."""


class GoneError(httpx.ConnectError):
    """What a call raises if the SuperLink is gone."""

    def __init__(self) -> None:
        super().__init__("refused")


class LargeError(httpx.HTTPStatusError):
    """What a call raises if its answer is too large."""

    def __init__(self) -> None:
        request = httpx.Request("POST", "https://localhost")
        super().__init__("too large", request=request, response=httpx.Response(413))


def grid(stub: Any, run: int) -> Any:
    """A ServerApp's grid, whose calls go to the stub."""
    made: Any = HttpGrid(token="x")
    made.set_run(Run.create_empty(run))
    made._client = stub
    return made


class Link:
    """A SuperLink's own state and what handles calls, without a network: this is also the ServerApp's stub."""

    def __init__(self, monkeypatch: Any) -> None:
        objects = ObjectStoreFactory()
        states = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), objects)
        self.state: LinkState = states.state()
        self.store = self.state.object_store
        kind = TaskType.SERVER_APP
        self.run = self.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, kind)
        (run,) = self.state.get_run_info(run_ids=[self.run])
        assert self.state.claim_task(run.primary_task_id or 0)
        assert self.state.activate_task(run.primary_task_id or 0)
        (self._task,) = self.state.get_tasks(run_ids=[self.run])
        monkeypatch.setattr(TaskIdentity, "_run_id", self.run)

    def __getattr__(self, name: str) -> Any:
        handler = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)[1:]
        return lambda request: getattr(runtime_handlers, handler)(request, self.state, self._task)

    def push(self, head: Any, reply: Message, contents: dict[str, bytes]) -> None:
        """A node's answer, with these parts of it."""
        request = PushMessagesRequest(messages_list=[head], message_object_trees=[get_object_tree(reply)])
        answer = fleet_handlers.push_messages(request, self.state)
        for key in contents.keys() & {*answer.objects_to_push}:
            assert self.state.store_object(self.run, answer.session_id, key, contents[key])


def read(state: InMemoryNodeState, run: int) -> Message:
    """The message that an app's process takes from its SuperNode."""
    (message,) = state.get_messages_legacy(run_ids=[run], is_reply=False)
    return message


def shift_clock(monkeypatch: pytest.MonkeyPatch, by: timedelta) -> None:
    """This machine's clock is wrong by that much, for what signs its calls and for what compares clocks."""
    monkeypatch.setattr(node_auth_http_interceptor, "now", lambda: datetime.now(UTC) + by)
    monkeypatch.setattr(connections_http, "now", lambda: datetime.now(UTC) + by)
