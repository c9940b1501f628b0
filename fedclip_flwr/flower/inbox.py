"""Replies from the SuperLink, fetched so that no reply can harm the server.

Flower's own `pull_messages` waits for a reply with missing parts, up to two hours in 1.31 and three minutes in 1.42,
and reads nothing else meanwhile. A reply that can't be decoded ends the ServerApp and loses the replies pulled with it.
A list of a few bytes can make an array grow without limit. And it takes sender and question from the reply's own
metadata, which the site writes and nothing compares with what the SuperLink has verified. So this module fetches the
parts one by one, up to a size limit, decodes what is valid, and takes sender and question from the SuperLink.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message  # `Message(...)` sets its own metadata, and takes none
from flwr.common.constant import ErrorCode  # the codes that `flwr.app.Error` takes
from flwr.common.serde_utils import metadata_from_proto  # the SuperLink's own metadata of a reply
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest  # lets the SuperLink forget a reply
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,  # the body of a part: no public way to see it before decoding
    get_object_head_values_from_object_content,  # its kind and references
    iterate_object_tree,  # the parts of a reply
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf  # fetches one part
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectUnavailableError,  # a part has not arrived yet
    inflate_object_from_contents,  # decodes the parts
)

from fedclip_flwr.base.errors import one_line
from fedclip_flwr.flower import grids, lines
from fedclip_flwr.flower.sizes import message_size

MOST_PARTS = 2_000
"""Maximum parts of a reply: it has two for each tensor, and one for each 20 MB of it."""
MOST_GIVEN_UP = 1_000
"""Maximum messages whose late replies are still collected and discarded: each takes a SuperLink 0.1 ms."""


class _Announced(NamedTuple):
    """An announced reply: its metadata from the SuperLink, its parts, and the contents of those fetched so far."""

    metadata: Metadata
    parts: list[str]
    contents: dict[str, bytes]


class Inbox:
    """The replies that arrive on a grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid, self._remote = grid, grids.remote(grid)
        self._waiting: dict[str, _Announced] = {}
        self._given_up: list[str] = []

    @property
    def _calls(self) -> Any:
        """The client of the SuperLink's API."""
        return lines.module("messages").calls(self._grid)

    def take(self, asked: Collection[str], most: int) -> Iterator[tuple[Message, int]]:
        """The complete replies to these messages, with their sizes; an error replaces one larger than `most` bytes."""
        if self._remote:
            yield from (message for key in self._announced(asked) if (message := self._message(key, most)))
        else:  # sites on this machine that run this package
            yield from ((message, message_size(message)) for message in self._grid.pull_messages(asked))

    def give_up(self, keys: Iterable[str]) -> None:
        """Discard the replies to these messages: those that have arrived now, and later ones in later calls.

        A SuperLink keeps a reply until it is confirmed or the run ends.
        """
        self._given_up = [*self._given_up, *keys][-MOST_GIVEN_UP:]
        if not self._given_up:
            return
        if self._remote:
            arrived = set(self._announced(self._given_up))
            for key in arrived:
                self._confirm(self._waiting.pop(key))
        else:
            arrived = {reply.metadata.reply_to_message_id for reply in self._grid.pull_messages(self._given_up)}
        self._given_up = [key for key in self._given_up if key not in arrived]

    def _announced(self, asked: Collection[str]) -> list[str]:
        """The messages that have a reply, of which parts may still be missing."""
        new = [key for key in asked if key not in self._waiting]  # each is announced once
        answer = self._calls.PullMessages(lines.module("messages").PullAppMessagesRequest(message_ids=new))
        for head, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            metadata = metadata_from_proto(head.metadata)
            parts = [part.object_id for part in iterate_object_tree(tree)]
            self._waiting[metadata.reply_to_message_id] = _Announced(metadata, parts, {})
        wanted = set(asked)
        return [key for key in self._waiting if key in wanted]

    def _message(self, key: str, most: int) -> tuple[Message, int] | None:
        reply = self._waiting.pop(key)
        try:
            self._fetch(reply, most)
            message = make_message(metadata=reply.metadata, **_decoded(reply, most))
            return message, message_size(message)  # fails on names or shapes that can't be serialised
        except ObjectUnavailableError:
            self._waiting[key] = reply
            return None
        except lines.module("messages").CallFailed as error:
            if not lines.module("messages").too_large(error):
                raise
            why = "its answer is too large to fetch"
        except _TooLargeError as error:
            why = str(error)
        except Exception as error:  # a malicious reply can raise anything
            why = f"its answer can't be decoded ({one_line(f'{type(error).__name__}: {error}', 100)})"
        self._confirm(reply)  # lets the SuperLink delete it
        message = make_message(metadata=reply.metadata, error=Error(ErrorCode.UNKNOWN, why))
        return message, message_size(message)

    def _confirm(self, reply: _Announced) -> None:
        grid: Any = self._grid
        confirmed = reply.metadata.message_id
        self._calls.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=grid.node, run_id=grid.run.run_id, message_object_id=confirmed)
        )

    def _fetch(self, reply: _Announced, most: int) -> None:
        """Fetch the missing parts."""
        grid: Any = self._grid
        if len(reply.parts) > MOST_PARTS:
            raise _TooLargeError(f"its answer has {len(reply.parts):,} parts, expected at most {MOST_PARTS:,}")
        pull = make_pull_object_fn_protobuf(self._calls.PullObject, grid.node, grid.run.run_id)
        for part in reply.parts:
            if part not in reply.contents:
                reply.contents[part] = pull(part)
                _check_size(map(len, reply.contents.values()), most)
        self._confirm(reply)


class _TooLargeError(ValueError):
    pass


def _check_size(sizes: Iterable[int], most: int) -> None:
    if (size := sum(sizes)) > most:
        raise _TooLargeError(f"its answer has at least {size:,} bytes, expected at most {most:,}")


def _size_of(part: str, contents: Mapping[str, bytes], known: dict[str, int]) -> int:
    """The bytes of the part with everything that it references: it may reference one part many times."""
    if part not in known:
        kind, links, _ = get_object_head_values_from_object_content(contents[part])
        if kind == Array.__name__:
            links = [links[place] for place in json.loads(get_object_body(contents[part], Array))["arraychunk_ids"]]
        elif kind in (ArrayRecord.__name__, RecordDict.__name__):
            record: Any = {ArrayRecord.__name__: ArrayRecord, RecordDict.__name__: RecordDict}[kind]
            links = list(json.loads(get_object_body(contents[part], record)).values())
        known[part] = len(contents[part]) + sum(_size_of(one, contents, known) for one in links)
    return known[part]


def _decoded(reply: _Announced, most: int) -> dict[str, Any]:
    """The content or the error of the reply."""
    _check_size([_size_of(reply.metadata.message_id, reply.contents, {})], most)
    message = inflate_object_from_contents(reply.metadata.message_id, reply.contents)
    if not isinstance(message, Message):
        raise TypeError("not a message")
    if message.has_error():
        return {"error": message.error}
    if not isinstance(message.content, RecordDict):
        raise TypeError("its content is not a record")
    return {"content": message.content}
