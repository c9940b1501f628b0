"""Makes the processes of a site hostile, in the way that `HOSTILE` names; see tests/test_hostile.py.

Python imports this by itself in every process that has this folder on its path.
"""

from __future__ import annotations

import json
import os
from typing import Any

WAY = os.environ.get("HOSTILE", "")


def garbage() -> None:
    """Figures that can't be read, below a head that is as it should be."""
    from flwr.app import MetricRecord
    from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body

    MetricRecord.deflate = lambda self: add_header_to_object_body(b"\xff\xfe no figures", self)  # type: ignore[method-assign]


def endless() -> None:
    """Arrays of one chunk that is named a million times."""
    from flwr.app import Array
    from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body

    def deflate(self: Any) -> bytes:
        facts = {"dtype": self.dtype, "shape": self.shape, "stype": self.stype, "arraychunk_ids": [0] * 10**6}
        return add_header_to_object_body(json.dumps(facts).encode(), self)

    Array.deflate = deflate  # type: ignore[method-assign]


def nameless() -> None:
    """In the name of another node, as far as a site's own words go."""
    from flwr.app import Message

    deflate = Message.deflate

    def false(self: Any) -> bytes:
        own = self.metadata.src_node_id
        self.metadata.__dict__["_src_node_id"] = own + 1
        try:
            return deflate(self)
        finally:
            self.metadata.__dict__["_src_node_id"] = own

    Message.deflate = false  # type: ignore[method-assign]


def partless() -> None:
    """Answers to hellos as they should be; of later ones the announcement only."""
    from flwr.supernode import start_client_internal

    flower: Any = start_client_internal
    push = flower.push_object_contents_from_iterable
    count = [0]

    def pushed(*given: Any, **named: Any) -> None:
        count[0] += 1
        if count[0] == 1:
            push(*given, **named)

    flower.push_object_contents_from_iterable = pushed


if WAY:
    {"garbage": garbage, "endless": endless, "nameless": nameless, "partless": partless}[WAY]()
