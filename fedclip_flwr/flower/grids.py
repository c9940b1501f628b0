"""The grids that a ServerApp runs on: Flower's two, and one within this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid  # the one of a simulation

from fedclip_flwr.flower import lines

SERVER, RUN = 1, 2**63
"""The server's node id, and a run id as long as Flower's."""
Node = Callable[[Message], Message]
"""Answers a message, as a ClientApp does."""


class LocalGrid:
    """The part of a Grid that a run needs; its nodes are functions in this process.

    A message is answered when its reply is pulled, so that only one answer at a time is in memory.
    """

    def __init__(self, nodes: Mapping[int, Node]) -> None:
        self._nodes = nodes
        self._pushed: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [*self._nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for message in messages:
            pushed.append(os.urandom(32).hex())
            # only a grid sets these, and Flower's own grids do it in the same way
            message.metadata.__dict__.update(_run_id=RUN, _src_node_id=SERVER, _message_id=pushed[-1])
            self._pushed[pushed[-1]] = message
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for name in [name for name in message_ids if name in self._pushed]:
            message = self._pushed.pop(name)
            yield self._nodes[message.metadata.dst_node_id](message)


def local_grid(nodes: Mapping[int, Node]) -> Grid:
    """A grid for a run, whose nodes are functions in this process."""
    act_as_server()
    return cast(Grid, LocalGrid(nodes))


def act_as_server() -> None:
    """Let this process make messages, if it is not one of Flower's."""
    lines.module("messages").act_as_server(RUN, SERVER)


def remote(grid: Grid) -> bool:
    """True if the grid asks a SuperLink, which has real sites."""
    return isinstance(grid, lines.module("messages").RemoteGrid)


def simulated(grid: Grid) -> bool:
    """True if the sites are on this machine, in processes that Flower starts or in this one."""
    return isinstance(cast(object, grid), InMemoryGrid | LocalGrid)
