"""`fedclip site`: Flower's SuperNode, patched so that it does not hang.

A SuperNode takes a message, starts a process for it, waits for the answer, sends it, and takes the next message. It
waits forever for an answer whose process died; Flower 1.31 does so for a message that could not be fetched completely,
too. A message whose run stops while it is fetched is still processed: its answer is mistaken for that to the next
message, which is then withheld. And a SuperNode that was rejected, or whose heartbeat failed, may stay idle, where
systemd or Docker would restart it if it exited. This module fixes all of these. It also refuses a run with another app
than the installed one before anything of it is unpacked.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from logging import ERROR
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import (
    ErrorCode,  # the codes that `flwr.app.Error` takes
    Status,  # the state of a SuperNode's task
    SubStatus,  # how it ended
)
from flwr.common.logger import log  # the SuperNode's own log
from flwr.proto.message_pb2 import ObjectTree  # the parts of a message
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree  # which parts a message has
from flwr.supercore.object_store import ObjectStore  # the store of the parts
from flwr.supernode import start_client_internal as flower  # the SuperNode's loop: no hooks
from flwr.supernode.nodestate.in_memory_nodestate import (
    CLIENT_APP_CRASHED_ERROR,  # its own answer if a process died
    InMemoryNodeState,  # the messages in progress
)

from fedclip_flwr.base import UserError
from fedclip_flwr.flower import pinned
from fedclip_flwr.flower.ending import end, end_with_superexec
from fedclip_flwr.flower.patching import replace

UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)


def taking(take: Callable[..., int | None]) -> Callable[..., int | None]:
    """Wrap Flower's function that takes a message: delete the message if it must not be answered.

    A message of a run with another app than this site's gets an error before anything of that app is unpacked.
    """

    def take_or_delete(
        *,
        state: InMemoryNodeState,
        object_store: ObjectStore,
        receive: Callable[[], tuple[Message, ObjectTree] | None],
        get_fab: Callable[[str, int], Any],
        **more: Any,
    ) -> int | None:
        received: list[Message] = []

        def recorded() -> tuple[Message, ObjectTree] | None:
            if found := receive():
                received.append(found[0])
            return found

        def checked(name: str, run: int) -> Any:
            fab = get_fab(name, run)
            pinned.check(fab.content)
            return fab

        try:
            run = take(state=state, object_store=object_store, receive=recorded, get_fab=checked, **more)
        except UserError as error:
            log(ERROR, "%s", error)
            (message,) = received
            state.store_message(message)  # only stored messages can be answered
            _answer(message, Error(ErrorCode.INVALID_FAB, str(error)), state, object_store)
            return message.metadata.run_id
        if run is not None and state.msg_store:
            return run
        for task in state.get_tasks(statuses=UNFINISHED):
            state.finish_task(task.task_id, SubStatus.STOPPED, "its message must not be answered")
        _delete(list(state.msg_store), state, object_store)
        return None

    return take_or_delete


def sending(send: Callable[..., None]) -> Callable[..., None]:
    """Wrap Flower's function that sends an answer: wait for the work; without a complete answer, send a crash error."""

    def wait_and_send(*, state: InMemoryNodeState, object_store: ObjectStore, **more: Any) -> None:
        running = [task.task_id for task in state.get_tasks(statuses=UNFINISHED)]
        while state.get_tasks(task_ids=running, statuses=UNFINISHED):  # Flower keeps finished tasks too
            time.sleep(0.1)
        asked, answered = [], False
        for key, message in [(key, entry.message) for key, entry in state.msg_store.items()]:
            if not message.metadata.reply_to_message_id:
                asked.append(message)
            elif _is_complete(key, object_store):
                answered = True
            else:
                _delete([key], state, object_store)
        if not answered:
            for message in asked:
                _answer(message, CLIENT_APP_CRASHED_ERROR, state, object_store)
        send(state=state, object_store=object_store, **more)

    return wait_and_send


def _answer(message: Message, error: Error, state: InMemoryNodeState, object_store: ObjectStore) -> None:
    """Store the error as the answer to the message."""
    state.record_message_processing_start(message.metadata.message_id)
    state.record_message_processing_end(message.metadata.message_id)
    object_store.delete(message.metadata.message_id)
    flower._insert_message(Message(error, reply_to=message), state, object_store)


def _is_complete(message: str, object_store: ObjectStore) -> bool:
    """True if all parts of the message are stored."""
    return all(object_store.get(part.object_id) for part in iterate_object_tree(object_store.get_object_tree(message)))


def _delete(messages: list[str], state: InMemoryNodeState, object_store: ObjectStore) -> None:
    for message in messages:
        object_store.delete(message)
    state.delete_messages(message_ids=messages)


def main() -> None:
    """Run `flower-supernode`; the process exits when it ends."""
    from flwr.supernode.cli import flower_supernode  # the command as a function

    take, send = flower._pull_and_store_message, flower._push_messages
    replace(flower, _pull_and_store_message=taking(take), _push_messages=sending(send))
    threading.excepthook = _end_with_a_thread
    end_with_superexec("SuperNode")
    sys.argv[0] = "flower-supernode"
    status: Any = 1  # it returns only if it could not continue
    try:
        flower_supernode()
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    end(status if isinstance(status, int) else 1)


def _end_with_a_thread(failed: threading.ExceptHookArgs) -> None:
    """Exit if a thread fails: without the heartbeat thread, the node would stay but get no messages."""
    threading.__excepthook__(failed)
    end(1)


if __name__ == "__main__":
    main()
