"""The loop over rounds, on Flower's `Strategy` interface.

It is our own because Flower's counts from round 1 only, polls slowly and dies of one bad reply.

One exchange a round: a site first evaluates the adapter that it receives, then trains it, and answers with both. So
the line of round r (r = 0 is zero-shot) is known when the answers of round r + 1 are there; a closing EVALUATE
completes the last one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedclip_flwr import exchange
from fedclip_flwr.config import Settings
from fedclip_flwr.errors import UserError
from fedclip_flwr.exchange import Report, State
from fedclip_flwr.learning import best_round, mean_accuracy
from fedclip_flwr.nodes import Nodes
from fedclip_flwr.strategy import AdapterFedAvg

Configure = Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]]


@dataclass(frozen=True)
class Line:
    """The adapter after so many rounds, and what the round that made it took."""

    round: int
    reports: Mapping[str, Report]
    unseen: float | None
    bytes: int
    seconds: float

    @property
    def seen(self) -> float | None:
        return mean_accuracy(report.test for report in self.reports.values())

    @property
    def validation(self) -> float | None:
        return mean_accuracy(report.validation for report in self.reports.values())

    @property
    def loss(self) -> float | None:
        """Mean validation loss over the sites."""
        scores = [report.validation for report in self.reports.values()]
        known = [score.loss / score.examples for score in scores if score.examples]
        return sum(known) / len(known) if known else None


class Watcher(Protocol):
    """Who is told how the run goes."""

    def line(self, line: Line) -> None:
        """A round's line is known."""

    def selected(self, number: int, state: State) -> None:
        """This round's adapter is the best so far."""

    def complete(self, number: int, state: State) -> None:
        """The round's adapter is made."""


@dataclass(frozen=True)
class Outcome:
    """Zero-shot and the selected round, with a report of each site that could be asked, and that round's adapter."""

    zero_shot: Line
    adapted: Line
    state: State


def federate(
    nodes: Nodes,
    strategy: AdapterFedAvg,
    settings: Settings,
    state: State,
    unseen: Callable[[State], float | None],
    watcher: Watcher,
) -> Outcome:
    """Runs the rounds, beginning with the adapter `state`; `unseen` is its accuracy on the held-out domain."""
    start = best = state
    lines: list[Line] = []
    cost = nodes.traffic.both, 0.0

    def ask(configure: Configure, number: int, state: State, asked: Sequence[int]) -> list[Message]:
        """The replies of these nodes to what the strategy has for them; Flower's strategies wait if there is none."""
        if not asked:
            return []
        messages = configure(number, exchange.write_adapter(state), nodes.config(), nodes.view(asked))
        return nodes.ask(number, messages)

    def add(reports: Mapping[str, Report]) -> None:
        """The line of the adapter `state`, and whether it is the best so far."""
        nonlocal best
        lines.append(Line(len(lines), reports, unseen(state), *cost))
        watcher.line(lines[-1])
        if best_round([line.validation for line in lines]) == lines[-1].round:
            best = state
            watcher.selected(lines[-1].round, best)

    for number in range(1, settings.num_server_rounds + 1):
        nodes.meet(number)
        before, begun = nodes.traffic.both, time.monotonic()
        chosen = nodes.choose(settings.fraction_train, settings.seed, number)
        replies = ask(strategy.configure_train, number, state, chosen)
        averaged, _ = strategy.aggregate_train(number, replies)
        reports = nodes.sort_out(number, strategy)
        nodes.answers += len(replies)
        if len(reports) < settings.min_sites:
            raise UserError(
                f"round {number}: answers that can be used: {len(reports)}, min-sites = {settings.min_sites} are "
                f"needed; the last complete round is {number - 1}"
            )
        if averaged is None:
            raise UserError("no site has an example to learn from: use more data or fewer sites")
        spent = nodes.traffic.both - before, time.monotonic() - begun
        add(reports)
        state, cost = exchange.read_adapter(averaged, state), spent
        watcher.complete(number, state)

    def evaluate(number: int, state: State, asked: Sequence[int]) -> Mapping[str, Report]:
        strategy.aggregate_evaluate(number, ask(strategy.configure_evaluate, number, state, asked))
        return nodes.sort_out(number, strategy)

    add(evaluate(len(lines), state, nodes.good()))

    def whole(line: Line, state: State) -> Line:
        """The line with the reports of sites that were not asked, or not there, in its round."""
        others = evaluate(line.round, state, nodes.good(without=line.reports))
        return replace(line, reports={**line.reports, **others})

    selected = lines[best_round([line.validation for line in lines])]
    return Outcome(whole(lines[0], start), whole(selected, best), best)


def refuse(error: UserError) -> NoReturn:
    """Ends the ServerApp as failed, with the error's text as the last word: Flower would add several traces."""
    print(f"\nThis run can't go on. {error}", flush=True)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    threading.excepthook = lambda _: None  # a simulation runs the ServerApp in a thread
    raise error
