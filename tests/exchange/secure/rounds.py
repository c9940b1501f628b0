"""Rounds of secure aggregation in which members drop out in any step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedclip_flwr.exchange.secure.masking import UINT32, Numbers, NumberType, Shares
from fedclip_flwr.exchange.secure.member import Member
from fedclip_flwr.server.collector import Collector

TEN = [f"site-{number}" for number in range(10)]
CONTEXT = "run 7, round 3"
STEPS = ("keys", "shares", "vectors", "reveals")


def vector(name: str, dtype: NumberType = UINT32) -> Numbers:
    """Numbers that follow from the name."""
    data = hashlib.shake_128(name.encode()).digest(50 * dtype.itemsize)
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)


def total(names: Iterable[str], dtype: NumberType = UINT32) -> list[int]:
    columns = zip(*(vector(name, dtype).tolist() for name in names), strict=True)
    return [sum(column) % 2 ** (8 * dtype.itemsize) for column in columns]


def travelled(member: Member) -> Member:
    """As the next process finds it: out of Flower's own serialisation."""
    record = recorddict_to_proto(RecordDict({"masking": ConfigRecord(member.dump())})).SerializeToString()
    return Member.load(recorddict_from_proto(type(recorddict_to_proto(RecordDict())).FromString(record))["masking"])


def sent_on(shares: Mapping[str, Shares]) -> dict[str, dict[str, bytes]]:
    """For each member what the others have for it, as the server sends it on."""
    return {name: {sender: of.to(name) for sender, of in shares.items() if sender != name} for name in shares}


def until_vectors(
    names: Iterable[str], gone: Mapping[str, str], most: int, dtype: NumberType = UINT32
) -> tuple[Collector, dict[str, Member]]:
    """A round in which the masked vectors have come; `gone` tells who drops out in which step."""
    collector, members = Collector(CONTEXT, 50, most, dtype), {}
    for name in names:
        if gone.get(name) != "keys":
            members[name] = Member.begin(name, CONTEXT)
            collector.join(name, members[name].public)
    for name, publics in collector.neighbourhoods().items():
        if gone.get(name) != "shares":
            members[name] = travelled(members[name])
            collector.share(name, members[name].share(publics))
    for name, letters in collector.letters().items():
        if gone.get(name) != "vectors":
            members[name] = travelled(members[name])
            collector.add(name, members[name].mask(letters, vector(name, dtype)))
    return collector, members


def summed(names: Iterable[str], gone: Mapping[str, str], most: int = 20, dtype: NumberType = UINT32) -> list[int]:
    collector, members = until_vectors(names, gone, most, dtype)
    for name, (survivors, dropped) in collector.lists().items():
        if gone.get(name) != "reveals":
            collector.reveal(name, travelled(members[name]).reveal(survivors, dropped))
    return list(collector.sum().tolist())
