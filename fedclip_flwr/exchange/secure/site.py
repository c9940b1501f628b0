"""A site's side of secure aggregation: its answer in each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.records import ExchangeError
from fedclip_flwr.exchange.secure.masking import Numbers, finest_step, flat, quantise, unsigned
from fedclip_flwr.exchange.secure.member import Member
from fedclip_flwr.exchange.secure.protocol import MASKED, Memory, paired

MEMORY = "secure-aggregation"
"""The record of a site's secrets in its context's state."""


def _request(content: RecordDict) -> Mapping[str, Any]:
    record = content.config_records.get("masking")
    if record is None:
        raise ExchangeError(
            "this site gives its update only with secure aggregation, which the server's message lacks: do both sides "
            "run the same version of this package?"
        )
    return record


def _recall(request: Mapping[str, Any], memory: Memory) -> Member:
    kept = memory.get(MEMORY)
    if kept is None or kept["context"] != request["context"]:
        raise ExchangeError("this site has no secrets for this attempt: was its SuperNode restarted?")
    return Member.load(kept)


def _remember(member: Member, memory: Memory) -> None:
    memory[MEMORY] = ConfigRecord(member.dump())


def keys(content: RecordDict, memory: Memory) -> RecordDict:
    request = _request(content)
    member = Member.begin(request["name"], request["context"])
    _remember(member, memory)
    return RecordDict({"keys": ConfigRecord({"public": member.public})})


def shares(content: RecordDict, memory: Memory) -> RecordDict:
    request = _request(content)
    member = _recall(request, memory)
    letters, digests, seed = member.share(paired(request, "of", "publics"))
    _remember(member, memory)
    sent: dict[str, Any] = {"to": list(letters), "letters": list(letters.values()), "seed": seed}
    return RecordDict({"shares": ConfigRecord({**sent, "of": list(digests), "digests": list(digests.values())})})


def masked(content: RecordDict, memory: Memory, trained: State, received: Mapping[str, Tensor]) -> State:
    """The masked update, which is sent instead of the trained adapter."""
    request = _request(content)
    update = flat({name: trained[name].double() - received[name].double() for name in received})
    numbers = quantise(update.numpy(), finest_step(request["members"], request["bound"]), request["bound"])
    return _masked(request, memory, numbers)


class Replacing(NamedTuple):
    """The mark of the images whose sums this site's new ones are to replace, empty if none; True if none follow."""

    before: str
    leave: bool


def replacing(content: RecordDict) -> Replacing:
    request = _request(content)
    return Replacing(str(request.get("before", "")), request.get("leave") is True)


def masked_sums(content: RecordDict, memory: Memory, sums: Mapping[str, Tensor]) -> State:
    """The masked sums, which are sent instead of them: the very integers, so that their total is exact."""
    return _masked(_request(content), memory, unsigned(sums))


def _masked(request: Mapping[str, Any], memory: Memory, numbers: Numbers) -> State:
    member = _recall(request, memory)
    vector = member.mask(paired(request, "from", "letters"), numbers)
    _remember(member, memory)
    return {MASKED: torch.from_numpy(vector.view(f"int{8 * vector.itemsize}"))}


def unmask(content: RecordDict, memory: Memory) -> RecordDict:
    request = _request(content)
    member = _recall(request, memory)
    pieces = member.reveal(request["survivors"], request["dropped"])
    _remember(member, memory)
    return RecordDict({"unmask": ConfigRecord({"of": list(pieces), "pieces": list(pieces.values())})})


STEPS: Mapping[str, Callable[[RecordDict, Memory], RecordDict]] = {"keys": keys, "shares": shares, "unmask": unmask}
"""The answers in the three steps besides `train`."""
