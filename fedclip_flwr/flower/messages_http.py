"""Messages over HTTP: how a call fails, and who makes a message."""

from __future__ import annotations

import httpx
from flwr.supercore.task_identity import TaskIdentity  # set by Flower in its own processes only

CallFailed = httpx.HTTPError
"""What a ServerApp's failed call raises."""


def too_large(error: httpx.HTTPError) -> bool:
    """True if the answer is larger than a call may bring."""
    return (
        isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE
    )


def act_as_server(run: int, node: int) -> None:
    """Let this process make messages, as a ServerApp's does: elsewhere Flower refuses to."""
    if vars(TaskIdentity)["_task_id"] is None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, node
