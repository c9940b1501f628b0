"""Flower's SuperNode, which does not wait for ever: what `fedclip site` becomes.

A SuperNode takes a message, lets a process work on it, waits for the answer, sends it, and takes the next. In Flower
1.31 it waits for answers that never come: to a message that could not be fetched whole, or whose process died. A
message of a run that was stopped while it was fetched is worked on all the same; its answer is taken for that to the
next one, which is then kept back. And a SuperNode that was turned away, or whose heartbeat failed, may stay and do
nothing, where systemd or Docker would start it again if it ended. All that is mended here. And a run with another app
than the installed one is refused before anything of it is unpacked.
"""

from __future__ import annotations

import contextlib
import os
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
    Status,  # how far a task of the SuperNode's is
    SubStatus,  # and how it ended
)
from flwr.common.logger import log  # the SuperNode's own log
from flwr.common.typing import Fab  # an app's bundle, as it comes
from flwr.proto.message_pb2 import ObjectTree  # the parts of a message
from flwr.supercore.constant import FORCE_EXIT_TIMEOUT_SECONDS  # how long a SuperNode takes to end
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree  # which parts a message has
from flwr.supercore.object_store import ObjectStore  # where they are
from flwr.supernode import start_client_internal as flower  # the SuperNode's loop: it has no hooks
from flwr.supernode.nodestate.in_memory_nodestate import (
    CLIENT_APP_CRASHED_ERROR,  # its own answer where a process died
    InMemoryNodeState,  # the messages that it works on
)

from fedclip_flwr.base import UserError
from fedclip_flwr.flower import pinned

UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)


def taking(take: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's way to take a message, after which one that is not to be answered is forgotten.

    One of a run with another app than this site's is answered with an error before anything of that app is unpacked.
    """

    def take_or_forget(
        *,
        state: InMemoryNodeState,
        object_store: ObjectStore,
        receive: Callable[[], tuple[Message, ObjectTree] | None],
        get_fab: Callable[[str, int], Fab],
        **more: Any,
    ) -> int | None:
        received: list[Message] = []

        def noted() -> tuple[Message, ObjectTree] | None:
            if found := receive():
                received.append(found[0])
            return found

        def checked(name: str, run: int) -> Fab:
            fab = get_fab(name, run)
            pinned.check(fab.content)
            return fab

        try:
            run = take(state=state, object_store=object_store, receive=noted, get_fab=checked, **more)
        except UserError as error:
            log(ERROR, "%s", error)
            (message,) = received
            state.store_message(message)  # an answer is sent to what is there only
            _answer(message, Error(ErrorCode.INVALID_FAB, str(error)), state, object_store)
            return message.metadata.run_id
        if run is not None and state.msg_store:
            return run
        for task in state.get_tasks(statuses=UNFINISHED):
            state.finish_task(task.task_id, SubStatus.STOPPED, "its message is not to be answered")
        _forget(list(state.msg_store), state, object_store)
        return None

    return take_or_forget


def sending(send: Callable[..., None]) -> Callable[..., None]:
    """Flower's way to send an answer, once the work has ended; if there is no whole answer, that the app crashed."""

    def wait_and_send(*, state: InMemoryNodeState, object_store: ObjectStore, **more: Any) -> None:
        under_way = [task.task_id for task in state.get_tasks(statuses=UNFINISHED)]
        while state.get_tasks(task_ids=under_way, statuses=UNFINISHED):  # Flower keeps all tasks that ever were
            time.sleep(0.1)
        asked, answered = [], False
        for key, message in [(key, entry.message) for key, entry in state.msg_store.items()]:
            if not message.metadata.reply_to_message_id:
                asked.append(message)
            elif _whole(key, object_store):
                answered = True
            else:
                _forget([key], state, object_store)
        if not answered:
            for message in asked:
                _answer(message, CLIENT_APP_CRASHED_ERROR, state, object_store)
        send(state=state, object_store=object_store, **more)

    return wait_and_send


def _answer(message: Message, error: Error, state: InMemoryNodeState, object_store: ObjectStore) -> None:
    """Has the error sent in place of an answer to the message."""
    state.record_message_processing_start(message.metadata.message_id)
    state.record_message_processing_end(message.metadata.message_id)
    object_store.delete(message.metadata.message_id)
    flower._insert_message(Message(error, reply_to=message), state, object_store)


def _whole(message: str, object_store: ObjectStore) -> bool:
    """Whether all that the message consists of is there."""
    return all(object_store.get(part.object_id) for part in iterate_object_tree(object_store.get_object_tree(message)))


def _forget(messages: list[str], state: InMemoryNodeState, object_store: ObjectStore) -> None:
    for message in messages:
        object_store.delete(message)
    state.delete_messages(message_ids=messages)


def main() -> None:
    """`flower-supernode`, whose end is the end of the process."""
    from flwr.supernode.cli import flower_supernode  # the command as a function, once the loop is mended

    functions = vars(flower)
    functions["_pull_and_store_message"] = taking(functions["_pull_and_store_message"])
    functions["_push_messages"] = sending(functions["_push_messages"])
    threading.excepthook = _end_with_a_thread
    threading.Thread(target=_end_with_a_child, daemon=True).start()
    sys.argv[0] = "flower-supernode"
    status: Any = 1  # it returns only if it could not go on
    try:
        flower_supernode()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    _end(status if isinstance(status, int) else 1)


def _end_with_a_thread(failed: threading.ExceptHookArgs) -> None:
    """Without the one that tells the server that this node lives, it would be there and never be asked."""
    threading.__excepthook__(failed)
    _end(1)


def _end_with_a_child() -> None:
    """Without the process that starts those that answer, nothing would be answered."""
    while True:
        with contextlib.suppress(ChildProcessError):  # there is none yet
            os.waitpid(-1, 0)
            time.sleep(FORCE_EXIT_TIMEOUT_SECONDS)  # in which all may be over: it was told to end, and its child, too
            print("flower-superexec has ended: this SuperNode ends, too", file=sys.stderr)
            _end(1)
        time.sleep(1)


def _end(status: int) -> None:
    """At once: Python would wait for connections that do not end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
