"""The calls of a site as they travel over HTTP, seen by a man in the middle."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from deploy.relay import relayed

FLEET, OFFERED = "/v1/fleet/", b"\x08http/1.1"
"""What stands in each call; what a site offers to speak within TLS."""
HEAD = re.compile(rb"POST /v1/fleet/([a-z-]+) HTTP/1.1\r\n.*?[Cc]ontent-[Ll]ength: (\d+)\r\n.*?\r\n\r\n", re.DOTALL)


class Call(NamedTuple):
    """A call of the Fleet API and what was asked, as it travelled."""

    method: str
    asked: bytes


@contextmanager
def middle(port: int) -> Iterator[tuple[list[Call], int]]:
    """A man in the middle, who passes every byte on: the calls, complete at the end, and where he listens."""
    calls: list[Call] = []
    with relayed(port, keep=True) as relay:
        yield calls, relay.port
    for streams in relay.kept:
        at = 0
        while at < len(streams.sent):
            head = HEAD.match(streams.sent, at)
            assert head
            method = "".join(word.title() for word in head[1].decode().split("-"))
            at = head.end() + int(head[2])
            calls.append(Call(method, bytes(streams.sent[head.end() : at])))
