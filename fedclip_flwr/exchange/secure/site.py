"""A site's end of secure aggregation: what it answers in each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.records import ExchangeError
from fedclip_flwr.exchange.secure.masking import finest_step, flat, quantise
from fedclip_flwr.exchange.secure.member import Member
from fedclip_flwr.exchange.secure.protocol import MASKED, Memory, paired

MEMORY = "secure-aggregation"
"""Where a site's secrets are in its context's state."""


def _asked(content: RecordDict) -> Mapping[str, Any]:
    record = content.config_records.get("masking")
    if record is None:
        raise ExchangeError(
            "this site gives its update only with secure aggregation, which the server's message has not: are the "
            "versions of this package the same?"
        )
    return record


def _recall(asked: Mapping[str, Any], memory: Memory) -> Member:
    kept = memory.get(MEMORY)
    if kept is None or kept["context"] != asked["context"]:
        raise ExchangeError("this site has no secrets for this attempt: was its SuperNode started anew?")
    return Member.load(kept)


def _remember(member: Member, memory: Memory) -> None:
    memory[MEMORY] = ConfigRecord(member.dump())


def keys(content: RecordDict, memory: Memory) -> RecordDict:
    asked = _asked(content)
    member = Member.begin(asked["name"], asked["context"])
    _remember(member, memory)
    return RecordDict({"keys": ConfigRecord({"public": member.public})})


def shares(content: RecordDict, memory: Memory) -> RecordDict:
    asked = _asked(content)
    member = _recall(asked, memory)
    letters, digests, seed = member.share(paired(asked, "of", "publics"))
    _remember(member, memory)
    told: dict[str, Any] = {"to": list(letters), "letters": list(letters.values()), "seed": seed}
    return RecordDict({"shares": ConfigRecord({**told, "of": list(digests), "digests": list(digests.values())})})


def masked(content: RecordDict, memory: Memory, trained: State, received: Mapping[str, Tensor]) -> State:
    """What travels instead of the adapter that was trained."""
    asked = _asked(content)
    member = _recall(asked, memory)
    update = flat({name: trained[name].double() - received[name].double() for name in received})
    numbers = quantise(update.numpy(), finest_step(asked["members"], asked["bound"]), asked["bound"])
    vector = member.mask(paired(asked, "from", "letters"), numbers)
    _remember(member, memory)
    return {MASKED: torch.from_numpy(vector.view("int32"))}


def unmask(content: RecordDict, memory: Memory) -> RecordDict:
    asked = _asked(content)
    member = _recall(asked, memory)
    pieces = member.reveal(asked["survivors"], asked["dropped"])
    _remember(member, memory)
    return RecordDict({"unmask": ConfigRecord({"of": list(pieces), "pieces": list(pieces.values())})})


STEPS: Mapping[str, Callable[[RecordDict, Memory], RecordDict]] = {"keys": keys, "shares": shares, "unmask": unmask}
"""What a site does in the steps between."""
