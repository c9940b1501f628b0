"""Ports for the servers that we start on this machine.

Between the choice of a port and its use, the system may give it to an outgoing connection if it is in the range for
those: from 32768 on Linux, higher elsewhere. So we choose below (and above the ports of Ray's workers, 10002 to 19999),
and each of our processes has a block of ports of its own.
"""

from __future__ import annotations

import functools
import itertools
import random
import socket
from collections.abc import Iterator

from fedclip_flwr.base import UserError

BLOCK = 200
BLOCKS = range(20_000, 32_000, BLOCK)
NONE_LEFT = f"No free ports from {BLOCKS.start} to {BLOCKS.stop}: end programs on this machine that hold them."


def free_ports(count: int) -> list[int]:
    """Free ports of this machine that no other process of ours is given; in turn, so that none comes again soon."""
    _, own = _block()
    ports: list[int] = []
    for port in itertools.islice(own, BLOCK - 1):
        if held := _held(port):
            held.close()
            ports.append(port)
        if len(ports) == count:
            return ports
    raise UserError(NONE_LEFT)


@functools.cache
def _block() -> tuple[socket.socket, Iterator[int]]:
    """This process's ports, after the first of their block, which it holds for as long as it lives."""
    for first in random.SystemRandom().sample(BLOCKS, len(BLOCKS)):
        if held := _held(first):
            return held, itertools.cycle(range(first + 1, first + BLOCK))
    raise UserError(NONE_LEFT)


def _held(port: int) -> socket.socket | None:
    """A socket that holds the port, if it is free."""
    one = socket.socket()
    try:
        one.bind(("127.0.0.1", port))
    except OSError:
        one.close()
        return None
    return one
