"""The server's end of secure aggregation: one attempt at a round."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedclip_flwr.base import Settings
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import ExchangeError, Report
from fedclip_flwr.exchange.secure.masking import Shares, dequantise, finest_step, unflat
from fedclip_flwr.exchange.secure.protocol import ANSWERS, MASKED, LetterError, MaskingError, paired
from fedclip_flwr.server.collector import Collector
from fedclip_flwr.server.nodes import Nodes
from fedclip_flwr.server.strategy import AdapterFedAvg

BOUND = 4.0
"""Of each number of an update; what is beyond is cut off. Noise of a site's own has more room."""
MOST = 25
"""So many sites share their secrets with each other; of more, each with so many near it in a ring."""


def _shares(answer: Mapping[str, Any]) -> Shares:
    return Shares(paired(answer, "to", "letters"), paired(answer, "of", "digests"), _bytes(answer, "seed"))


def _bytes(answer: Mapping[str, Any], key: str) -> bytes:
    if not isinstance(value := answer[key], bytes):
        raise ExchangeError(f"{key} is not what it should be")
    return value


def bound_of(settings: Settings) -> float:
    """Of each number of an update that is masked."""
    noise = settings.clipping_norm * (1 + 8 * settings.noise_multiplier) if settings.dp == "local" else 0.0
    return max(BOUND, noise)


class SecureSum:
    """One attempt at a round: `prepare`, then the sites train by messages that `address` has completed, then `mean`."""

    def __init__(self, nodes: Nodes, number: int, state: State, training: Sequence[int], settings: Settings) -> None:
        """Whoever is found to spoil it is distrusted by the `nodes`."""
        self._nodes, self._number, self._state = nodes, number, state
        self._bound, self._least = bound_of(settings), settings.least_sites
        self._size = sum(tensor.numel() for tensor in state.values())
        self._context = f"{nodes.key}/{number}/{os.urandom(8).hex()}"
        order = random.SystemRandom().sample(training, len(training))
        self._members = {node: f"{place:06}" for place, node in enumerate(order)}
        self._sites = {member: nodes.names[node] for node, member in self._members.items()}
        self._by_site = {site: member for member, site in self._sites.items()}
        self._collector = Collector(self._context, self._size, MOST)
        self._letters: dict[str, dict[str, bytes]] = {}

    def prepare(self) -> list[int]:
        """The first two steps; the nodes that go on."""
        collector = self._collector
        asked: Mapping[str, dict[str, Any]] = {name: {"name": name} for name in self._members.values()}
        self._ask("keys", asked, lambda name, answer: collector.join(name, _bytes(answer, "public")))
        near = collector.neighbourhoods()
        asked = {name: {"of": list(of), "publics": list(of.values())} for name, of in near.items()}
        self._ask("shares", asked, lambda name, answer: collector.share(name, _shares(answer)))
        self._letters = collector.letters()
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
                self._collector.add(self._by_site[site], state[MASKED].numpy().view("uint32"))
            except MaskingError as error:
                raise ExchangeError(str(error)) from None

        strategy.screen(self._without_blame(replies), {MASKED: torch.empty(self._size, dtype=torch.int32)}, take)
        for site, why in strategy.dropped.items():
            self._nodes.fails(self._number, site, why)
        strategy.dropped = {}
        if (came := len(strategy.reports)) < self._least:  # a sum that is thrown away would tell of the next one
            raise MaskingError(f"{came} updates came, {self._least} must: nothing is unmasked")
        lists = self._collector.lists()
        asked = {name: {"survivors": came, "dropped": gone} for name, (came, gone) in lists.items()}
        self._ask("unmask", asked, lambda name, answer: self._collector.reveal(name, paired(answer, "of", "pieces")))
        try:
            total = dequantise(self._collector.sum(), finest_step(len(self._letters), self._bound))
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
                self._nodes.fails(self._number, self._nodes.names[node], one_line(error))
