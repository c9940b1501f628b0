"""What a ServerApp needs for its messages over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
from flwr.proto.runtime_pb2 import PullAppMessagesRequest as PullAppMessagesRequest  # a grid would fetch the parts, too
from flwr.supercore.exit import add_exit_handler as add_exit_handler  # no other notice of a ServerApp's end
from flwr.supercore.task_identity import TaskIdentity  # set by Flower in its own processes only
from flwr.superlink.grid import HttpGrid as RemoteGrid  # no public way to distinguish the grids

CallFailed = httpx.HTTPError
"""The exception of a ServerApp's failed call."""


def calls(grid: RemoteGrid) -> Any:
    """The grid's client of the SuperLink's API."""
    return grid._runtime_client


def too_large(error: httpx.HTTPError) -> bool:
    """True if the answer is larger than a call may bring."""
    return (
        isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE
    )


def act_as_server(run: int, node: int) -> None:
    """Let this process make messages, as a ServerApp's does: elsewhere Flower refuses to."""
    if vars(TaskIdentity)["_task_id"] is None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, node
