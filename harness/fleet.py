"""Sites that cost next to nothing: they say to a SuperLink what SuperNodes say, and start no process for an answer.

Each has a key, a node and a connection of its own. It asks for messages every 3 seconds, signs whatever it says,
fetches all that a message is made of, and pushes all that its answer is made of. No heartbeats: it says at first that
there will be none for half an hour.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MAX_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import PULL_BACKOFF_CAP, PULL_INITIAL_BACKOFF
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

from fedclip_flwr.flower import lines

speaking: Any = import_module(f"harness.speaking_{lines.line().name}")
"""How the installed line of Flower speaks."""
Answer = Callable[[str, str], RecordDict]
"""What the site of some name answers to a message of some type."""
PAUSE = 3.0
"""Seconds in which a SuperNode that had no message does not ask again."""
WORKERS = 8


class Site:
    """One of them."""

    def __init__(self, name: str, stub: Any, public: bytes, answer: Answer) -> None:
        self.questions = 0
        self._stub, self._name, self._answer = stub, name, answer
        self._stub.RegisterNode(RegisterNodeFleetRequest(public_key=public))
        active = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_MAX_INTERVAL)
        self._node = Node(node_id=self._stub.ActivateNode(active).node_id)

    def beat(self) -> None:
        """A heartbeat."""
        self._stub.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_MAX_INTERVAL)
        )

    def leave(self) -> None:
        """As a SuperNode that ends does."""
        self._stub.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))

    def poll(self) -> PullMessagesResponse:
        """Asks for a message."""
        self.questions += 1
        came: PullMessagesResponse = self._stub.PullMessages(PullMessagesRequest(node=self._node))
        return came

    def live(self) -> Iterator[float]:
        """Asks for messages and answers them; yields whenever there is nothing to do for so many seconds."""
        while True:
            came = self.poll()
            if came.messages_list:
                question, tree = message_from_proto(came.messages_list[0]), came.message_object_trees[0]
                yield from self._fetch(question.metadata.run_id, tree)
                self._send(Message(self._answer(self._name, question.metadata.message_type), reply_to=question))
            else:
                yield PAUSE

    def _fetch(self, run: int, tree: ObjectTree) -> Iterator[float]:
        """Fetches all of a message; what the server has not pushed yet a second later, then two, then four."""
        pull = make_pull_object_fn_protobuf(self._stub.PullObject, self._node, run)
        parts, pause = [part.object_id for part in iterate_object_tree(tree)], PULL_INITIAL_BACKOFF
        while parts:
            try:
                pull(parts[0])
                parts.pop(0)
            except ObjectUnavailableError:
                yield pause
                pause = min(2 * pause, PULL_BACKOFF_CAP)
        make_confirm_message_received_fn_protobuf(self._stub.ConfirmMessageReceived, self._node, run)(tree.object_id)

    def _send(self, reply: Message) -> None:
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            parts = get_all_nested_objects(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
            taken = self._stub.PushMessages(request)
            push = speaking.pusher(self._stub, self._node, reply.metadata.run_id, taken)
            for part in taken.objects_to_push:
                push(part, parts[part].deflate())


@contextmanager
def connected(port: int) -> Iterator[tuple[Any, bytes]]:
    """A connection of its own to the SuperLink that listens there, with a new key; and that key."""
    key, public = generate_key_pairs()
    with speaking.speaking(port, key) as stub:
        yield stub, public_key_to_bytes(public)


@contextmanager
def fleet(port: int, count: int, answer: Answer) -> Iterator[list[Site]]:
    """So many sites at the SuperLink that listens there."""
    with ExitStack() as stack:
        sites = []
        for number in range(count):
            stub, public = stack.enter_context(connected(port))
            sites.append(Site(f"{port}-{number}", stub, public, answer))
        yield sites


@contextmanager
def living(sites: Sequence[Site]) -> Iterator[None]:
    """The sites ask and answer meanwhile."""
    over = threading.Event()
    threads = [threading.Thread(target=_let_live, args=(sites[n::WORKERS], over)) for n in range(WORKERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _let_live(sites: Sequence[Site], over: threading.Event) -> None:
    """Goes from site to site as they are due; in the beginning one after the other."""
    begun = time.monotonic()
    due = [(begun + PAUSE * number / len(sites), number, site.live()) for number, site in enumerate(sites)]
    while due and not over.wait(max(0.0, due[0][0] - time.monotonic())):
        _, number, life = due[0]
        heapq.heapreplace(due, (time.monotonic() + next(life), number, life))
