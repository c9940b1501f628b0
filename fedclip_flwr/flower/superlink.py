"""`fedclip server`: Flower's SuperLink, where no node can speak for another, and where sites reach only their API.

A SuperNode signs each request, and the SuperLink compares the key with the node, except for the sender named in an
answer (and, in Flower 1.31, for the node to activate). So a registered site could answer in another's name. What is
added to Flower is in this wing's modules `superlink_grpc` and `superlink_http`. And it ends if its SuperExec has ended,
where Flower's stays, and starts no run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,  # activates a node: the named key is compared
    PushMessagesRequest,  # answers: the named node is compared
    RegisterNodeFleetRequest,  # registers a node: the named key is compared
)

from fedclip_flwr.base import UserError
from fedclip_flwr.flower import lines
from fedclip_flwr.flower.ending import end_with_superexec


def start(options: Sequence[str]) -> NoReturn:
    """Replace this process by a SuperLink with these options."""
    lines.warn()
    lines.module("superlink").check(options)
    _check_database(options)
    command = [sys.executable, "-P", "-m", __name__, *options]
    os.execve(command[0], command, {**os.environ, **lines.NO_INSTALLATION})


def _check_database(options: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--database", default="")
    database = parser.parse_known_args(options)[0].database
    folder = Path(database).parent
    if "://" not in database and not folder.is_dir():
        raise UserError(f"--database {database}: there is no folder {folder}; make it, or give a file in another one")


def objection(request: Any, key: bytes) -> str | None:
    """The reason to refuse this request of a node with that key; None if it is allowed."""
    if isinstance(request, ActivateNodeRequest | RegisterNodeFleetRequest) and request.public_key != key:
        return "this public key belongs to another node"
    if isinstance(request, PushMessagesRequest):
        senders = {message.metadata.src_node_id for message in request.messages_list}
        if senders != {request.node.node_id}:
            return "this answer is from another node"
    return None


if __name__ == "__main__":
    end_with_superexec("SuperLink")
    lines.module("superlink").main(sys.argv[1:])
