"""The loop over rounds, on Flower's `Strategy` interface.

It is our own because Flower's counts from round 1 only, polls slowly and dies of one bad reply.

One exchange a round: a site first evaluates the adapter that it receives, then trains it, and answers with both. So
the line of round r (r = 0 is zero-shot) is known when the answers of round r + 1 are there; a closing EVALUATE
completes the last one. Sites that do not train in a round evaluate in it: rounds are compared on the same sites.

After each round the watcher is told where the run stands; from such a `Standing` it goes on as if it had never stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import privacy, records
from fedclip_flwr.exchange.records import Report
from fedclip_flwr.exchange.secure.protocol import MaskingError
from fedclip_flwr.learning.metrics import Quality
from fedclip_flwr.learning.recipes import RECIPES
from fedclip_flwr.learning.selection import BLENDS, better, chosen
from fedclip_flwr.server import noised
from fedclip_flwr.server.nodes import Nodes
from fedclip_flwr.server.results import Line, Outcome, Standing
from fedclip_flwr.server.secure_sum import SecureSum
from fedclip_flwr.server.strategy import AdapterFedAvg

Configure = Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]]
ATTEMPTS = 3
"""So often a round is tried before the run stops for want of answers."""


class Watcher(Protocol):
    """Who is told how the run goes."""

    def line(self, line: Line) -> None:
        """A round's line is known."""

    def selected(self, number: int, state: State, blend: float) -> None:
        """This round's adapter, with so much of it in the features, is the best so far."""

    def complete(self, standing: Standing) -> None:
        """A round's adapter is made; the run can go on from here."""


def federate(
    nodes: Nodes,
    strategy: AdapterFedAvg,
    settings: Settings,
    start: State,
    unseen: Callable[[State, float], Mapping[str, Quality]],
    watcher: Watcher,
    standing: Standing | None = None,
) -> Outcome:
    """Runs the rounds, beginning with the adapter `start`, or going on from where the run stands.

    `unseen` is how good an adapter is on the held-out domains, with such a blend.
    """
    at = standing or Standing(0, start, start, bytes=nodes.traffic.both)  # so far, of the hellos
    share = settings.trained_blend
    if standing and settings.dp == "local":  # what was under way when the run was stopped has been seen, too
        nodes.trained.update(dict.fromkeys(nodes.trained, ATTEMPTS))
    at.epsilon = privacy.spent(settings, nodes.trained.values())
    if standing and settings.dp == "local":
        watcher.complete(at)  # it may be stopped again
    if at.best:  # what was selected after that round, which was not completed, may be in its place
        watcher.selected(at.best.round, at.best_state, share)
    recipe = RECIPES[settings.recipe]

    def messages_of(
        configure: Configure, number: int, state: State, asked: Sequence[int], config: ConfigRecord
    ) -> Iterable[Message]:
        """What the strategy has for these nodes; Flower's strategies would wait for some if there were none."""
        if not asked:
            return []
        return configure(number, records.write_adapter(state), config, nodes.view(asked))

    def with_reports(line: Line, reports: Mapping[str, Report]) -> Line:
        """The line with these reports, those of the holdout sites apart."""
        sites, holdouts = ({name: reports[name] for name in sorted(reports.keys() & of)} for of in nodes.by_role)
        return replace(line, reports=sites, holdouts=holdouts)

    def add(reports: Mapping[str, Report]) -> tuple[Line, Line]:
        """The line of the latest adapter, and whether it is the best so far; that of round 0, and the best."""
        line = with_reports(
            Line(at.round, {}, unseen(at.state, share), at.bytes, at.seconds, epsilon=at.epsilon), reports
        )
        watcher.line(line)
        at.zero = at.zero or line
        if (
            at.best is None
            or at.best.round < recipe.first_choice
            or chosen(line.validations, at.best.validations, at.zero.validations, recipe)
        ):
            at.best, at.best_state = line, at.state
            watcher.selected(line.round, at.state, share)
        return at.zero, at.best

    def attempt(
        number: int, without: Collection[str]
    ) -> tuple[ArrayRecord | None, Mapping[str, Report], Mapping[str, Report]]:
        """The mean of what the sites have trained, the reports that came with it, and those of the other sites."""
        training, others = nodes.choose(settings.fraction_train, settings.seed, number, settings.least_sites, without)
        nodes.trains(training)
        masks: SecureSum | None = None
        if settings.secure_aggregation:
            masks = SecureSum(nodes, number, at.state, training, settings)
        try:
            training = masks.prepare() if masks else training
            messages = messages_of(strategy.configure_train, number, at.state, training, nodes.config())
            asked = [masks.address(message) if masks else message for message in messages]
            asked += messages_of(strategy.configure_evaluate, number, at.state, others, nodes.config())
            at.questions += len(asked)
            evaluations: list[Message] = []
            replies = trained(nodes.ask(number, asked, at.state), evaluations)
            if masks:
                mean = masks.mean(strategy, replies)
                averaged: ArrayRecord | None = strategy.step(
                    number, noised.of_sum(mean, at.state, len(strategy.reports), settings)
                )
            else:
                averaged, _ = strategy.aggregate_train(number, replies)
        except MaskingError as error:
            nodes.say(f"round {number}: no sum can be made: {error}")
            return None, {}, {}
        reports = nodes.sort_out(number, strategy)
        strategy.aggregate_evaluate(number, evaluations)
        return averaged, reports, nodes.sort_out(number, strategy)

    for number in range(at.round + 1, settings.num_server_rounds + 1):
        if settings.early_stop and at.best and at.round - 1 - at.best.round >= settings.early_stop:
            break  # the line before the latest adapter's is the last that is known
        nodes.meet(number)
        before, begun, memory = nodes.traffic.both, time.monotonic(), strategy.memory
        tried, without = 0, frozenset[str]()
        while True:
            trusted = len(nodes.distrusted)
            averaged, reports, others = attempt(number, without)
            if len(reports) >= settings.least_sites:
                break
            tried += trusted == len(nodes.distrusted)  # else there is one less to spoil it
            without = nodes.failed if settings.secure_aggregation else without
            needed = f"min-sites = {settings.least_sites} are needed"
            few = f"round {number}: answers that can be used: {len(reports)}, {needed}"
            if tried == ATTEMPTS:
                raise UserError(f"{few}; it was tried {ATTEMPTS} times")
            nodes.say(f"{few}; the round is repeated")
            strategy.memory = memory
            nodes.wait_for(settings.least_sites, number)
        if averaged is None:
            raise UserError("no site has an example to learn from: use more data or fewer sites")
        spent = nodes.traffic.both - before
        at.question_bytes += spent
        add({**reports, **others})
        at.state = nodes.link.step(records.read_adapter(averaged, at.state), number)
        at.round, at.bytes, at.seconds = number, spent, time.monotonic() - begun
        at.epsilon = privacy.spent(settings, nodes.trained.values())
        watcher.complete(at)

    def evaluated(
        number: int, state: State, asked: Sequence[int], personal: bool = False, blend: float | None = None
    ) -> Mapping[str, Report]:
        config = nodes.config(personal, blend)
        messages = messages_of(strategy.configure_evaluate, number, state, asked, config)
        strategy.aggregate_evaluate(number, nodes.ask(number, messages, state))
        return nodes.sort_out(number, strategy)

    zero, best = add(evaluated(at.round, at.state, nodes.good()))

    def whole(line: Line, state: State) -> Line:
        """The line with the reports of sites that were not there in its round."""
        known = {**line.reports, **line.holdouts}
        return with_reports(line, {**known, **evaluated(line.round, state, nodes.good(known))})

    def blended(line: Line, state: State, blend: float) -> Line:
        """The line with less of the adapter in the features."""
        reports = evaluated(line.round, state, nodes.good(), blend=blend)
        return with_reports(replace(line, unseen=unseen(state, blend)), reports)

    zero_shot = whole(zero, start) if settings.starts_as_zero_shot else blended(zero, start, 0.0)
    adapted = whole(best, at.best_state)
    if settings.blend == "auto":
        plain = adapted
        for blend in sorted((b for b in BLENDS if b < 1), reverse=True):  # of several that do as well, the smallest
            found = blended(plain, at.best_state, blend)
            if not better(adapted.validations, found.validations, recipe):
                share, adapted = blend, found
        watcher.selected(adapted.round, at.best_state, share)
    told = share if share != settings.trained_blend else None
    alone = nodes.good(without=nodes.by_role.holdouts)
    personal = evaluated(adapted.round, at.best_state, alone, True, told) if settings.personalize else {}
    per_question = at.question_bytes / max(at.questions, 1)
    return Outcome(at.round, zero_shot, adapted, share, personal, at.best_state, per_question, at.epsilon)


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
