"""Secure aggregation at the server: one attempt at a round, of updates or of sums."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.errors import one_line
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import some
from fedclip_flwr.exchange import ExchangeError, Report
from fedclip_flwr.exchange.secure.masking import (
    UINT32,
    UINT64,
    Numbers,
    Shares,
    dequantise,
    finest_step,
    signed,
    unflat,
)
from fedclip_flwr.exchange.secure.protocol import ANSWERS, MASKED, LetterError, MaskingError, paired
from fedclip_flwr.server.collector import Collector
from fedclip_flwr.server.nodes import LETTER_FROM, Nodes
from fedclip_flwr.server.one_round import OneRoundStrategy
from fedclip_flwr.server.strategy import AdapterFedAvg

BOUND = 4.0
"""The largest magnitude of an update's numbers, which are clipped to it; with local noise there is more room."""
NEIGHBOURHOOD = 25
"""Up to this many sites all share secrets with each other; of more, each with as many near it in a ring."""


def _shares(answer: Mapping[str, Any]) -> Shares:
    return Shares(paired(answer, "to", "letters"), paired(answer, "of", "digests"), _bytes(answer, "seed"))


def _bytes(answer: Mapping[str, Any], key: str) -> bytes:
    if not isinstance(value := answer[key], bytes):
        raise ExchangeError(f"{key}: expected bytes, found {type(value).__name__}")
    return value


def bound_of(settings: Settings) -> float:
    """The largest magnitude of a masked update's numbers."""
    noise = settings.clipping_norm * (1 + 8 * settings.noise_multiplier) if settings.dp == "local" else 0.0
    return max(BOUND, noise)


class SecureSum:
    """One attempt at a round: `prepare`, then send the messages from `address`, then `aggregate`."""

    NUMBERS, SENT = UINT32, torch.int32
    """The type of the numbers that are summed, and the one in which they travel."""

    def __init__(
        self,
        nodes: Nodes,
        number: int,
        state: State,
        training: Sequence[int],
        strategy: AdapterFedAvg,
        settings: Settings,
    ) -> None:
        """A site that breaks the sum is added to the `distrusted` ones of `nodes`."""
        self._strategy, self._like = strategy, strategy.answered
        self._nodes, self._number, self._state = nodes, number, state
        self._bound, self._least = bound_of(settings), settings.least_sites
        self._size = sum(tensor.numel() for tensor in self._like.values())
        self._context = f"{nodes.key}/{number}/{os.urandom(8).hex()}"
        order = random.SystemRandom().sample(training, len(training))
        self._members = {node: f"{place:06}" for place, node in enumerate(order)}
        self._sites = {member: nodes.names[node] for node, member in self._members.items()}
        self._by_site = {site: member for member, site in self._sites.items()}
        self._collector = Collector(self._context, self._size, NEIGHBOURHOOD, self.NUMBERS)
        self._letters: dict[str, dict[str, bytes]] = {}

    def prepare(self) -> list[int]:
        """Runs the steps `keys` and `shares`; returns the nodes that are still in."""
        collector = self._collector
        asked: Mapping[str, dict[str, Any]] = {name: {"name": name} for name in self._members.values()}
        self._ask("keys", asked, lambda name, answer: collector.join(name, _bytes(answer, "public")))
        near = collector.neighbourhoods()
        asked = {name: {"of": list(of), "publics": list(of.values())} for name, of in near.items()}
        self._ask("shares", asked, lambda name, answer: collector.share(name, _shares(answer)))
        self._letters = collector.letters()
        return [node for node, name in self._members.items() if name in self._letters]

    def address(self, message: Message) -> Message:
        """The TRAIN message with the letters for its site."""
        letters = self._letters[self._members[message.metadata.dst_node_id]]
        record: dict[str, Any] = {"context": self._context, "members": len(self._letters), "bound": self._bound}
        record |= {"from": list(letters), "letters": list(letters.values())}
        record |= self._replacing(self._nodes.names[message.metadata.dst_node_id])
        content = RecordDict({**message.content, "masking": ConfigRecord(record)})
        return Message(content, message.metadata.dst_node_id, message.metadata.message_type)

    def _replacing(self, site: str) -> dict[str, Any]:
        """What the site's answer is to replace."""
        return {}

    def aggregate(self, replies: Iterable[Message]) -> State:
        """The state that follows from the sum; the strategy has the reports."""
        strategy = self._strategy

        def take(site: str, report: Report, state: State) -> None:
            if site not in self._by_site:
                raise ExchangeError("it was not asked")
            try:
                self._collector.add(self._by_site[site], state[MASKED].numpy().view(self.NUMBERS))
            except MaskingError as error:
                raise ExchangeError(str(error)) from None

        strategy.screen(self._without_blame(replies), {MASKED: torch.empty(self._size, dtype=self.SENT)}, take)
        for site, why in strategy.dropped.items():
            self._nodes.fails(self._number, site, why)
        strategy.dropped = {}
        self._check()
        lists = self._collector.lists()
        asked = {name: {"survivors": survivors, "dropped": dropped} for name, (survivors, dropped) in lists.items()}
        self._ask("unmask", asked, lambda name, answer: self._collector.reveal(name, paired(answer, "of", "pieces")))
        try:
            return self._state_of(self._collector.sum())
        except LetterError as error:
            self._nodes.distrusted.add(self._sites[error.sender])
            raise

    def _check(self) -> None:
        """Raises unless the sum may be unmasked."""
        arrived = self._strategy.reports.keys()
        if len(arrived) < self._least:  # a discarded sum would reveal part of the next one
            raise MaskingError(f"{len(arrived)} updates arrived, expected {self._least}: nothing is unmasked")
        if self._nodes.discarded not in (None, arrived):
            raise MaskingError("the sum of other sites was discarded before this one: nothing is unmasked")

    def _state_of(self, total: Numbers) -> State:
        """The state plus the mean of the updates."""
        values = dequantise(total, finest_step(len(self._letters), self._bound))
        update = unflat(torch.from_numpy(values) / len(self._strategy.reports), self._state)
        return {name: (tensor.double() + update[name]).to(tensor.dtype) for name, tensor in self._state.items()}

    def _without_blame(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies without those that blame a site for an unreadable letter. A site is distrusted if more than one,
        and more than a quarter of those that got its letters, blame it."""
        for reply in replies:
            if not reply.has_error():
                yield reply
                continue
            node, sender = reply.metadata.src_node_id, str(reply.error.reason)
            blamer = self._nodes.names[node]
            if sender not in self._letters.get(self._members.get(node, ""), {}):
                self._nodes.fails(self._number, blamer, "it blames a site that sent it nothing")
                continue
            blamed = self._sites[sender]
            self._nodes.fails(self._number, blamer, f"{LETTER_FROM}{blamed}")
            by = self._nodes.blames.setdefault(blamed, set())
            by.add(blamer)
            if len(by) > max(1.0, len(self._letters[sender]) / 4):
                self._nodes.distrusted.add(blamed)

    def _ask(
        self, step: str, asked: Mapping[str, Mapping[str, Any]], take: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        """Asks these members and passes their answers to `take`; a member without a valid answer has dropped out."""
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
                    raise ExchangeError(f"malformed answer to {step}: install the same version of fedclip-flwr there")
                take(self._members[node], record)
            except (MaskingError, ExchangeError, TypeError, ValueError) as error:
                self._nodes.fails(self._number, self._nodes.names[node], one_line(error))


class SecureTotal(SecureSum):
    """As `SecureSum`, with the sums of `method=one-round`, whose total is exact.

    The total is checked, as single sums can't be. An impossible one names nobody, and the server has seen it: then only
    a total of the same sites is unmasked, because a difference could be one site's sums.
    """

    NUMBERS, SENT = UINT64, torch.int64

    def _replacing(self, site: str) -> dict[str, Any]:
        earlier, leave = self._nodes.earlier.get(site), site in self._nodes.leaving
        return {"before": earlier[2], "leave": leave} if earlier else {}

    def _check(self) -> None:
        super()._check()
        if shown := self._nodes.exposed(self._strategy.reports, self._least):
            raise MaskingError(f"the total would show the sums of {some(shown)}: nothing is unmasked")

    def _state_of(self, total: Numbers) -> State:
        strategy = self._strategy
        assert isinstance(strategy, OneRoundStrategy)
        try:
            return strategy.of_total(signed(total, self._like), self._nodes.leaving)
        except UserError as error:
            self._nodes.discarded = frozenset(strategy.reports)
            raise MaskingError(
                f"the total of {len(strategy.reports)} sites' masked sums is impossible ({error}), and nobody can tell "
                "which site is to blame"
            ) from None


def secure_sum(settings: Settings) -> type[SecureSum]:
    """What the method sums."""
    return SecureTotal if settings.method == ONE_ROUND else SecureSum
