"""Secure aggregation as messages: what the server sees of the sites' updates is their sum, and nothing else.

Both ends of it; the arithmetic is in `masking.py`. The server asks in four steps:

    query.keys    a number for the site, and a name for this attempt  →  public keys
    query.shares  public keys of others                               →  pieces of its secrets in a letter for each
    train         letters from others, and the adapter                →  scores, and its update, masked
    query.unmask  whose update came, and whose did not                →  pieces of their secrets

Between them a site's secrets are in the memory of its SuperNode, in Flower's `context.state`. Sites are numbered anew
in each attempt, so that they learn nothing of each other. In each step some may drop out: as long as more than half of
those that a site shares with stay, the sum is that of those whose update came. Flower 1.31 has a SecAgg+ of its own,
which can't be had here: docs/security.md says why.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from fedclip_flwr import exchange
from fedclip_flwr.codecs import State
from fedclip_flwr.config import Settings
from fedclip_flwr.exchange import ExchangeError, Report
from fedclip_flwr.masking import (
    Gathering,
    LetterError,
    MaskingError,
    Member,
    Shares,
    dequantise,
    finest_step,
    quantise,
)
from fedclip_flwr.nodes import Nodes
from fedclip_flwr.strategy import AdapterFedAvg

BOUND = 4.0
"""Of each number of an update; what is beyond is cut off. Noise of a site's own has more room."""
MOST = 25
"""So many sites share their secrets with each other; of more, each with so many near it in a ring."""
MEMORY = "secure-aggregation"
"""Where a site's secrets are in its context's state."""
MASKED = "masked"
"""The name of what travels instead of the adapter's tensors."""
ANSWERS = {
    "keys": frozenset({"public"}),
    "shares": frozenset({"to", "letters", "of", "digests", "seed"}),
    "unmask": frozenset({"of", "pieces"}),
}
"""What a site answers in the steps between."""


def flat(update: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([update[name].reshape(-1) for name in sorted(update)])


def unflat(numbers: Tensor, like: Mapping[str, Tensor]) -> State:
    parts = torch.split(numbers, [like[name].numel() for name in sorted(like)])
    return {name: part.view(like[name].shape) for name, part in zip(sorted(like), parts, strict=True)}


def _paired(record: Mapping[str, Any], names: str, values: str) -> dict[str, bytes]:
    """Two lists of a record as one mapping."""
    lists = record[names], record[values]
    for found, kind in zip(lists, (str, bytes), strict=True):
        if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
            raise ExchangeError(f"{names} and {values} are not what they should be")
    return dict(zip(*lists, strict=True))


def _shares(answer: Mapping[str, Any]) -> Shares:
    return Shares(_paired(answer, "to", "letters"), _paired(answer, "of", "digests"), _bytes(answer, "seed"))


def _bytes(answer: Mapping[str, Any], key: str) -> bytes:
    if not isinstance(value := answer[key], bytes):
        raise ExchangeError(f"{key} is not what it should be")
    return value


def bound_of(settings: Settings) -> float:
    """Of each number of an update that is masked."""
    noise = settings.clipping_norm * (1 + 8 * settings.noise_multiplier) if settings.dp == "local" else 0.0
    return max(BOUND, noise)


# A site

Memory = MutableMapping[str, ConfigRecord]


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
    letters, digests, seed = member.share(_paired(asked, "of", "publics"))
    _remember(member, memory)
    told: dict[str, Any] = {"to": list(letters), "letters": list(letters.values()), "seed": seed}
    return RecordDict({"shares": ConfigRecord({**told, "of": list(digests), "digests": list(digests.values())})})


def masked(content: RecordDict, memory: Memory, trained: State, received: Mapping[str, Tensor]) -> State:
    """What travels instead of the adapter that was trained."""
    asked = _asked(content)
    member = _recall(asked, memory)
    update = flat({name: trained[name].double() - received[name].double() for name in received})
    numbers = quantise(update.numpy(), finest_step(asked["members"], asked["bound"]), asked["bound"])
    vector = member.mask(_paired(asked, "from", "letters"), numbers)
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


# The server


class SecureSum:
    """One attempt at a round: `prepare`, then the sites train by messages that `address` has completed, then `mean`."""

    def __init__(
        self,
        nodes: Nodes,
        number: int,
        state: State,
        training: Sequence[int],
        settings: Settings,
    ) -> None:
        """Whoever is found to spoil it is distrusted by the `nodes`."""
        self._nodes, self._number, self._state = nodes, number, state
        self._bound, self._least = bound_of(settings), settings.least_sites
        self._size = sum(tensor.numel() for tensor in state.values())
        self._context = f"{nodes.key}/{number}/{os.urandom(8).hex()}"
        order = random.SystemRandom().sample(training, len(training))
        self._members = {node: f"{place:06}" for place, node in enumerate(order)}
        self._sites = {member: nodes.names[node] for node, member in self._members.items()}
        self._by_site = {site: member for member, site in self._sites.items()}
        self._gathering = Gathering(self._context, self._size, MOST)
        self._letters: dict[str, dict[str, bytes]] = {}

    def prepare(self) -> list[int]:
        """The first two steps; the nodes that go on."""
        gathering = self._gathering
        asked: Mapping[str, dict[str, Any]] = {name: {"name": name} for name in self._members.values()}
        self._ask("keys", asked, lambda name, answer: gathering.join(name, _bytes(answer, "public")))
        near = gathering.neighbourhoods()
        asked = {name: {"of": list(of), "publics": list(of.values())} for name, of in near.items()}
        self._ask("shares", asked, lambda name, answer: gathering.share(name, _shares(answer)))
        self._letters = gathering.letters()
        return [node for node, name in self._members.items() if name in self._letters]

    def address(self, message: Message) -> Message:
        """The message to train, with the letters for its site."""
        letters = self._letters[self._members[message.metadata.dst_node_id]]
        record: dict[str, Any] = {"context": self._context, "members": len(self._letters), "bound": self._bound}
        record |= {"from": list(letters), "letters": list(letters.values())}
        content = RecordDict({**message.content, "masking": ConfigRecord(record)})
        return Message(content, message.metadata.dst_node_id, message.metadata.message_type)

    def mean(self, strategy: AdapterFedAvg, replies: Iterable[Message]) -> State:
        """What the updates that came make of the state, as a mean; the strategy has their reports."""

        def take(site: str, report: Report, state: State) -> None:
            if site not in self._by_site:
                raise ExchangeError("it was not asked")
            try:
                self._gathering.add(self._by_site[site], state[MASKED].numpy().view("uint32"))
            except MaskingError as error:
                raise ExchangeError(str(error)) from None

        strategy.screen(self._without_blame(replies), {MASKED: torch.empty(self._size, dtype=torch.int32)}, take)
        for site, why in strategy.dropped.items():
            self._nodes.fails(self._number, site, why)
        strategy.dropped = {}
        if (came := len(strategy.reports)) < self._least:  # a sum that is thrown away would tell of the next one
            raise MaskingError(f"{came} updates came, {self._least} must: nothing is unmasked")
        lists = self._gathering.lists()
        asked = {name: {"survivors": came, "dropped": gone} for name, (came, gone) in lists.items()}
        self._ask("unmask", asked, lambda name, answer: self._gathering.reveal(name, _paired(answer, "of", "pieces")))
        try:
            total = dequantise(self._gathering.sum(), finest_step(len(self._letters), self._bound))
        except LetterError as error:
            self._nodes.distrusted.add(self._sites[error.sender])
            raise
        update = unflat(torch.from_numpy(total) / len(lists), self._state)
        return {name: (tensor.double() + update[name]).to(tensor.dtype) for name, tensor in self._state.items()}

    def _without_blame(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies but those that say whose letter could not be opened: more than one, and a quarter of those that
        got one, are believed."""
        for reply in replies:
            if not reply.has_error():
                yield reply
                continue
            node, sender = reply.metadata.src_node_id, str(reply.error.reason)
            blamer = self._nodes.names[node]
            if sender not in self._letters.get(self._members.get(node, ""), {}):
                self._nodes.fails(self._number, blamer, "it blames one that has sent it nothing")
                continue
            blamed = self._sites[sender]
            self._nodes.fails(self._number, blamer, f"it can't open the letter from {blamed}")
            by = self._nodes.blames.setdefault(blamed, set())
            by.add(blamer)
            if len(by) > max(1.0, len(self._letters[sender]) / 4):
                self._nodes.distrusted.add(blamed)

    def _ask(
        self, step: str, asked: Mapping[str, Mapping[str, Any]], take: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        """Asks these members, and takes what they answer; whoever does not answer well has dropped out."""
        messages = []
        for node, name in self._members.items():
            if name in asked:
                masking = ConfigRecord({"context": self._context, **asked[name]})
                config = ConfigRecord({**self._nodes.config(), "server-round": self._number})
                content = RecordDict({"config": config, "masking": masking})
                messages.append(Message(content, node, f"query.{step}"))
        for reply in self._nodes.ask(self._number, messages, self._state):
            node = reply.metadata.src_node_id
            try:
                record = reply.content.config_records.get(step, ConfigRecord())
                if {*reply.content} != {step} or {*record} != ANSWERS[step]:
                    raise ExchangeError(f"its answer to {step} is none: is its version of this package another one?")
                take(self._members[node], record)
            except (MaskingError, ExchangeError, TypeError, ValueError) as error:
                self._nodes.fails(self._number, self._nodes.names[node], exchange.one_line(error))
