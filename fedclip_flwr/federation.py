"""The loop over rounds, on Flower's `Strategy` interface.

It is our own because Flower's counts from round 1 only, polls slowly and dies of one bad reply.

One exchange a round: a site first evaluates the adapter that it receives, then trains it, and answers with both. So
the line of round r (r = 0 is zero-shot) is known when the answers of round r + 1 are there; a closing EVALUATE
completes the last one. Sites that do not train in a round evaluate in it: rounds are compared on the same sites.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import NoReturn, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from fedclip_flwr import exchange
from fedclip_flwr.codecs import State
from fedclip_flwr.config import Settings
from fedclip_flwr.errors import UserError
from fedclip_flwr.exchange import Report
from fedclip_flwr.learning import BLENDS, RECIPES, best_blend
from fedclip_flwr.metrics import Quality, mean_accuracy
from fedclip_flwr.nodes import Nodes
from fedclip_flwr.sites import starts_as_zero_shot
from fedclip_flwr.strategy import AdapterFedAvg

Configure = Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]]


@dataclass(frozen=True)
class Line:
    """The adapter after so many rounds, and what the round that made it took.

    `reports` are of the sites that train, `holdouts` of those that only evaluate; `unseen` is how it does on the
    held-out domain that the server itself has.
    """

    round: int
    reports: Mapping[str, Report]
    unseen: Quality | None
    bytes: int
    seconds: float
    holdouts: Mapping[str, Report] = field(default_factory=dict)

    @property
    def seen(self) -> float | None:
        return mean_accuracy(report.test for report in self.reports.values())

    @property
    def held_out(self) -> list[Quality]:
        """All that is known of what nobody trains on."""
        return [*([self.unseen] if self.unseen else []), *(report.test for report in self.holdouts.values())]

    @property
    def validation(self) -> float | None:
        return mean_accuracy(report.validation for report in self.reports.values())

    @property
    def loss(self) -> float | None:
        """Mean validation loss over the sites."""
        scores = [report.validation for report in self.reports.values()]
        known = [score.loss / score.examples for score in scores if score.examples]
        return sum(known) / len(known) if known else None


def better(later: Line, best: Line) -> bool:
    """Whether the later adapter does better by validation, at the sites that tried both: sites come and go."""
    both = later.reports.keys() & best.reports.keys()
    new, old = (mean_accuracy(line.reports[site].validation for site in both) for line in (later, best))
    if new is None or old is None:  # there is no telling: what the present sites have tried, if they could
        return later.validation is not None or best.validation is None
    return new > old


class Watcher(Protocol):
    """Who is told how the run goes."""

    def line(self, line: Line) -> None:
        """A round's line is known."""

    def selected(self, number: int, state: State, blend: float) -> None:
        """This round's adapter, with so much of it in the features, is the best so far."""

    def complete(self, number: int, state: State) -> None:
        """The round's adapter is made."""


@dataclass(frozen=True)
class Outcome:
    """Zero-shot and the selected round, with a report of each site that could be asked, and that round's adapter.

    `blend` is the share of the adapted feature that belongs to it. `personal` has the reports of the sites' own
    adapters, where there are any.
    """

    zero_shot: Line
    adapted: Line
    blend: float
    personal: Mapping[str, Report]
    state: State
    site_round_bytes: float  # the mean over sites and rounds


def federate(
    nodes: Nodes,
    strategy: AdapterFedAvg,
    settings: Settings,
    state: State,
    unseen: Callable[[State, float], Quality | None],
    watcher: Watcher,
) -> Outcome:
    """Runs the rounds, beginning with the adapter `state`.

    `unseen` is how good an adapter is on the held-out domain, with such a blend.
    """
    start = best = state
    share = settings.trained_blend
    lines: list[Line] = []
    cost = nodes.traffic.both, 0.0
    asked = round_bytes = 0

    def choice(lines: Sequence[Line]) -> int:
        """The round that is best by validation, as `best_round` has it for sites that are always the same."""
        first, *others = lines[RECIPES[settings.recipe].first_choice :] or lines[-1:]
        return reduce(lambda best, line: line if better(line, best) else best, others, first).round

    def messages_of(
        configure: Configure, number: int, state: State, asked: Sequence[int], config: ConfigRecord
    ) -> Iterable[Message]:
        """What the strategy has for these nodes; Flower's strategies would wait for some if there were none."""
        if not asked:
            return []
        return configure(number, exchange.write_adapter(state), config, nodes.view(asked))

    def with_reports(line: Line, reports: Mapping[str, Report]) -> Line:
        """The line with these reports, those of the holdout sites apart."""
        sites, holdouts = ({name: reports[name] for name in sorted(reports.keys() & of)} for of in nodes.by_role)
        return replace(line, reports=sites, holdouts=holdouts)

    def add(reports: Mapping[str, Report]) -> None:
        """The line of the adapter `state`, and whether it is the best so far."""
        nonlocal best
        lines.append(with_reports(Line(len(lines), {}, unseen(state, share), *cost), reports))
        watcher.line(lines[-1])
        if choice(lines) == lines[-1].round:
            best = state
            watcher.selected(lines[-1].round, best, share)

    for number in range(1, settings.num_server_rounds + 1):
        nodes.meet(number)
        before, begun = nodes.traffic.both, time.monotonic()
        training, others = nodes.choose(settings.fraction_train, settings.seed, number)
        messages = [
            *messages_of(strategy.configure_train, number, state, training, nodes.config()),
            *messages_of(strategy.configure_evaluate, number, state, others, nodes.config()),
        ]
        evaluations: list[Message] = []
        averaged, _ = strategy.aggregate_train(number, trained(nodes.ask(number, messages, state), evaluations))
        reports = nodes.sort_out(number, strategy)
        if len(reports) < settings.min_sites:
            raise UserError(
                f"round {number}: answers that can be used: {len(reports)}, min-sites = {settings.min_sites} are "
                f"needed; the last complete round is {number - 1}"
            )
        if averaged is None:
            raise UserError("no site has an example to learn from: use more data or fewer sites")
        strategy.aggregate_evaluate(number, evaluations)
        reports = {**reports, **nodes.sort_out(number, strategy)}
        spent = nodes.traffic.both - before, time.monotonic() - begun
        asked, round_bytes = asked + len(training) + len(others), round_bytes + spent[0]
        add(reports)
        state, cost = nodes.link.step(exchange.read_adapter(averaged, state), number), spent
        watcher.complete(number, state)

    def evaluated(
        number: int, state: State, asked: Sequence[int], personal: bool = False, blend: float | None = None
    ) -> Mapping[str, Report]:
        config = nodes.config(personal, blend)
        messages = messages_of(strategy.configure_evaluate, number, state, asked, config)
        strategy.aggregate_evaluate(number, nodes.ask(number, messages, state))
        return nodes.sort_out(number, strategy)

    add(evaluated(len(lines), state, nodes.good()))

    def whole(line: Line, state: State) -> Line:
        """The line with the reports of sites that were not there in its round."""
        known = {**line.reports, **line.holdouts}
        return with_reports(line, {**known, **evaluated(line.round, state, nodes.good(known))})

    def blended(line: Line, state: State, blend: float) -> Line:
        """The line with less of the adapter in the features."""
        reports = evaluated(line.round, state, nodes.good(), blend=blend)
        return with_reports(replace(line, unseen=unseen(state, blend)), reports)

    zero_shot = whole(lines[0], start) if starts_as_zero_shot(settings) else blended(lines[0], start, 0.0)
    adapted = whole(lines[choice(lines)], best)
    if settings.blend == "auto":
        tried = {blend: blended(adapted, best, blend) for blend in BLENDS if blend < 1} | {share: adapted}
        share = best_blend({blend: line.validation for blend, line in tried.items()})
        adapted = tried[share]
        watcher.selected(adapted.round, best, share)
    told = share if share != settings.trained_blend else None
    alone = nodes.good(without=nodes.by_role.holdouts)
    personal = evaluated(adapted.round, best, alone, True, told) if settings.personalize else {}
    return Outcome(zero_shot, adapted, share, personal, best, round_bytes / max(asked, 1))


def trained(replies: Iterable[Message], others: list[Message]) -> Iterator[Message]:
    """The replies to TRAIN as they come; the `others` are kept."""
    for reply in replies:
        if reply.metadata.message_type == MessageType.TRAIN:
            yield reply
        else:
            others.append(reply)


def refuse(error: UserError) -> NoReturn:
    """Ends the ServerApp as failed, with the error's text as the last word: Flower would add several traces."""
    print(f"\nThis run can't go on. {error}", flush=True)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    threading.excepthook = lambda _: None  # a simulation runs the ServerApp in a thread
    raise error
