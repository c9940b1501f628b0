"""Replies from the SuperLink, none of which can do the server harm before it is looked at.

`GrpcGrid.pull_messages` of Flower 1.31 waits up to two hours for a reply whose parts do not come, and nothing else is
read meanwhile; a reply that can't be put together ends the ServerApp, and with it are lost those that came with it. A
list of a few bytes lets an array grow without end. And who sent a reply, and to what, it takes from words of the site's
own within the reply, which nobody has compared with those that the SuperLink has checked. So here the parts are fetched
one by one, up to a size, and put together as far as they make sense; from the SuperLink comes who sent what.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import grpc
from flwr.app import Array, ArrayRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message  # `Message(...)` sets its own metadata, and takes none
from flwr.common.constant import ErrorCode  # the codes that `flwr.app.Error` takes
from flwr.common.serde_utils import metadata_from_proto  # what the SuperLink itself tells of a reply
from flwr.proto.appio_pb2 import PullAppMessagesRequest  # a grid's `pull_messages`, without fetching the parts
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest  # lets the SuperLink forget a reply
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,  # what a part consists of: no public way to look before it is put together
    get_object_head_values_from_object_content,  # and of what kind it is
    iterate_object_tree,  # and which parts a reply has
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf  # fetches one part
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectUnavailableError,  # a part that is not there yet
    inflate_object_from_contents,  # puts the parts together
)

from fedclip_flwr.base.errors import one_line
from fedclip_flwr.flower.grids import GrpcGrid
from fedclip_flwr.flower.sizes import message_size

MOST_PARTS = 2_000
"""Of a reply: two for each tensor, and one for each 20 MB of it."""
MOST_GIVEN_UP = 1_000
"""Messages whose replies are no longer wanted and still listened for: a SuperLink takes 0.1 ms for each."""


class _Announced(NamedTuple):
    """A reply that is announced; who sent it to what, and its parts, some of which are fetched."""

    metadata: Metadata
    parts: list[str]
    contents: dict[str, bytes]


class Inbox:
    """What has come in on a grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._waiting: dict[str, _Announced] = {}
        self._given_up: list[str] = []

    def take(self, asked: Collection[str], most: int) -> Iterator[tuple[Message, int]]:
        """The replies to these messages that are there whole, and their sizes; a larger one is an error instead."""
        if isinstance(self._grid, GrpcGrid):
            yield from (message for key in self._announced(asked) if (message := self._message(key, most)))
        else:  # sites on this machine, by this package
            yield from ((message, message_size(message)) for message in self._grid.pull_messages(asked))

    def give_up(self, keys: Iterable[str]) -> None:
        """The replies to these messages are no longer wanted: what has come of them by now, or by a later call, goes.

        A SuperLink keeps a reply till it is confirmed, or till the run's end.
        """
        self._given_up = [*self._given_up, *keys][-MOST_GIVEN_UP:]
        if not self._given_up:
            return
        if isinstance(self._grid, GrpcGrid):
            came = set(self._announced(self._given_up))
            for key in came:
                self._confirm(self._waiting.pop(key))
        else:
            came = {reply.metadata.reply_to_message_id for reply in self._grid.pull_messages(self._given_up)}
        self._given_up = [key for key in self._given_up if key not in came]

    def _announced(self, asked: Collection[str]) -> list[str]:
        """Those of the messages to which there is a reply, of which parts may still be missing."""
        grid: Any = self._grid
        new = [key for key in asked if key not in self._waiting]  # each is announced once
        answer = grid._stub.PullMessages(PullAppMessagesRequest(message_ids=new))
        for head, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            metadata = metadata_from_proto(head.metadata)
            parts = [part.object_id for part in iterate_object_tree(tree)]
            self._waiting[metadata.reply_to_message_id] = _Announced(metadata, parts, {})
        wanted = set(asked)
        return [key for key in self._waiting if key in wanted]

    def _message(self, key: str, most: int) -> tuple[Message, int] | None:
        parcel = self._waiting.pop(key)
        try:
            self._fetch(parcel, most)
            message = make_message(metadata=parcel.metadata, **_put_together(parcel, most))
            return message, message_size(message)  # which fails where names or shapes are such as can't be written
        except ObjectUnavailableError:
            self._waiting[key] = parcel
            return None
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            why = "its answer is too large to be fetched"
        except _TooLargeError as error:
            why = str(error)
        except Exception as error:  # of what a site has made up, anything can come
            why = f"its answer can't be put together ({one_line(f'{type(error).__name__}: {error}', 100)})"
        self._confirm(parcel)  # the SuperLink need not keep it
        message = make_message(metadata=parcel.metadata, error=Error(ErrorCode.UNKNOWN, why))
        return message, message_size(message)

    def _confirm(self, parcel: _Announced) -> None:
        grid: Any = self._grid
        confirmed = parcel.metadata.message_id
        grid._stub.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=grid.node, run_id=grid.run.run_id, message_object_id=confirmed)
        )

    def _fetch(self, parcel: _Announced, most: int) -> None:
        """Fetches the parts that are missing."""
        grid: Any = self._grid
        if len(parcel.parts) > MOST_PARTS:
            raise _TooLargeError(f"its answer has {len(parcel.parts):,} parts, expected at most {MOST_PARTS:,}")
        pull = make_pull_object_fn_protobuf(grid._stub.PullObject, grid.node, grid.run.run_id)
        for part in parcel.parts:
            if part not in parcel.contents:
                parcel.contents[part] = pull(part)
                _check_size(map(len, parcel.contents.values()), most)
        self._confirm(parcel)


class _TooLargeError(ValueError):
    pass


def _check_size(sizes: Iterable[int], most: int) -> None:
    if (size := sum(sizes)) > most:
        raise _TooLargeError(f"its answer has {size:,} bytes and more, expected at most {most:,}")


def _size_of(part: str, contents: Mapping[str, bytes], known: dict[str, int]) -> int:
    """How many bytes the part has with all that it names: it may name one any number of times."""
    if part not in known:
        kind, named, _ = get_object_head_values_from_object_content(contents[part])
        if kind == Array.__name__:
            named = [named[place] for place in json.loads(get_object_body(contents[part], Array))["arraychunk_ids"]]
        elif kind in (ArrayRecord.__name__, RecordDict.__name__):
            record: Any = {ArrayRecord.__name__: ArrayRecord, RecordDict.__name__: RecordDict}[kind]
            named = list(json.loads(get_object_body(contents[part], record)).values())
        known[part] = len(contents[part]) + sum(_size_of(one, contents, known) for one in named)
    return known[part]


def _put_together(parcel: _Announced, most: int) -> dict[str, Any]:
    """The content or the error that the parts make."""
    _check_size([_size_of(parcel.metadata.message_id, parcel.contents, {})], most)
    message = inflate_object_from_contents(parcel.metadata.message_id, parcel.contents)
    if not isinstance(message, Message):
        raise TypeError("it is no message")
    if message.has_error():
        return {"error": message.error}
    if not isinstance(message.content, RecordDict):
        raise TypeError("its content is no record")
    return {"content": message.content}
