"""The size of a message as Flower serialises it."""

from __future__ import annotations

from functools import lru_cache

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import (
    message_to_proto,  # messages as sent: no public way to get their size
    recorddict_to_proto,  # their contents
)
from flwr.common.serde_utils import metadata_to_proto  # their metadata
from flwr.proto.message_pb2 import Message as ProtoMessage  # both together


def message_size(message: Message) -> int:
    """The bytes of the message as Flower serialises it.

    Does not serialise arrays, which would take longer than averaging them. Does not make another message from the
    metadata: Flower would mark it as undelivered, and a simulation, which shares it, would deliver the message again.
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
    field = 1 + max(1, -(-content.bit_length() // 7)) + content  # field number, length, content
    return int(ProtoMessage(metadata=metadata_to_proto(message.metadata)).ByteSize()) + field


@lru_cache(maxsize=64)
def _size_of_arrays(name: str, kinds: tuple[tuple[str, str, tuple[int, ...], str, int], ...]) -> int:
    """The bytes of a record of such arrays, which depend only on their kinds."""
    record = ArrayRecord({key: Array(dtype, shape, stype, bytes(size)) for key, dtype, shape, stype, size in kinds})
    return int(recorddict_to_proto(RecordDict({name: record})).ByteSize())
