"""Flower's own parts on the gRPC line, for tests that put them together."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import grpc
import pytest
from flwr.app import Message
from flwr.client.grpc_rere_client import node_auth_client_interceptor
from flwr.common.constant import NOOP_FLWR_AID
from flwr.common.typing import Fab as Fab
from flwr.common.typing import Run as Run
from flwr.common.typing import RunNotRunningException as RunNotRunningException
from flwr.proto.appio_pb2 import PullAppMessagesResponse as PullAppMessagesResponse
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.server.superlink.fleet.message_handler import message_handler
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.server.superlink.serverappio import serverappio_servicer
from flwr.server.superlink.serverappio.serverappio_servicer import ServerAppIoServicer
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION, RunType
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.superexec.plugin import ClientAppExecPlugin as ExecPlugin
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import GrpcGrid
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

__all__ = ["ExecPlugin"]


UNKNOWN_KEY = "No SuperNode found with the given public key"
"""The words with which a SuperNode ends whose key is not registered."""


class GoneError(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """What a call raises if the SuperLink is gone."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE


class LargeError(GoneError):
    """What a call raises if its answer is too large."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.RESOURCE_EXHAUSTED


def grid(stub: Any, run: int) -> Any:
    """A ServerApp's grid, whose calls go to the stub."""
    made: Any = GrpcGrid(token="x")
    made.set_run(Run.create_empty(run))
    made._channel, made._grpc_stub = cast(Any, object()), stub
    return made


class Link:
    """A SuperLink's own state and what handles calls, without a network: this is also the ServerApp's stub."""

    def __init__(self, monkeypatch: Any) -> None:
        objects = ObjectStoreFactory()
        states = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), objects)
        self.state: LinkState = states.state()
        self.store = objects.store()
        self.run = self.state.create_run(None, None, None, {}, NOOP_FEDERATION, None, NOOP_FLWR_AID, RunType.SERVER_APP)
        (run,) = self.state.get_run_info(run_ids=[self.run])
        assert self.state.claim_task(run.primary_task_id or 0)
        assert self.state.activate_task(run.primary_task_id or 0)
        self._servicer = ServerAppIoServicer(states, objects)
        monkeypatch.setattr(serverappio_servicer, "_get_authenticated_serverapp_run_id", lambda _: self.run)

    def __getattr__(self, name: str) -> Any:
        return lambda request: getattr(self._servicer, name)(request, None)

    def push(self, head: Any, reply: Message, contents: dict[str, bytes]) -> None:
        """A node's answer, with these parts of it."""
        request = PushMessagesRequest(messages_list=[head], message_object_trees=[get_object_tree(reply)])
        missing = message_handler.push_messages(request, self.state, self.store).objects_to_push
        for key in contents.keys() & {*missing}:
            self.store.put(key, contents[key])


def read(state: InMemoryNodeState, run: int) -> Message:
    """The message that an app's process takes from its SuperNode."""
    (message,) = state.get_messages(run_ids=[run], is_reply=False)
    return message


def shift_clock(monkeypatch: pytest.MonkeyPatch, by: timedelta) -> None:
    """This machine's clock is wrong by that much, for what signs its calls."""
    monkeypatch.setattr(node_auth_client_interceptor, "now", lambda: datetime.now(UTC) + by)
