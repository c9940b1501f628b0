"""How many bytes a message has as Flower serialises it."""

from __future__ import annotations

from functools import lru_cache

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import (
    message_to_proto,  # messages as they are sent: no public way to know their size
    recorddict_to_proto,  # and their contents
)
from flwr.common.serde_utils import metadata_to_proto  # and their metadata
from flwr.proto.message_pb2 import Message as ProtoMessage  # and what holds both


def message_size(message: Message) -> int:
    """How many bytes the message has as Flower serialises it.

    Arrays are not serialised for it, for that would take longer than to average them. Nor is another message made of
    its metadata: Flower then marks these as not delivered, and a simulation, which shares them, delivers it again.
    """
    if message.has_error():
        return int(message_to_proto(message).ByteSize())
    others, arrays = RecordDict(), 0
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            kinds = ((key, a.dtype, tuple(a.shape), a.stype, len(a.data)) for key, a in record.items())
            arrays += _size_of_arrays(name, tuple(kinds))
        else:
            others[name] = record
    content = int(recorddict_to_proto(others).ByteSize()) + arrays
    field = 1 + max(1, -(-content.bit_length() // 7)) + content  # its number, its length, and the content itself
    return int(ProtoMessage(metadata=metadata_to_proto(message.metadata)).ByteSize()) + field


@lru_cache(maxsize=64)
def _size_of_arrays(name: str, kinds: tuple[tuple[str, str, tuple[int, ...], str, int], ...]) -> int:
    """The same for every record of such arrays."""
    record = ArrayRecord({key: Array(dtype, shape, stype, bytes(size)) for key, dtype, shape, stype, size in kinds})
    return int(recorddict_to_proto(RecordDict({name: record})).ByteSize())
