"""The loop over rounds, on Flower's `Strategy` interface.

It is our own because Flower's counts from round 1 only, polls slowly, and ends with the first bad reply.

There is one exchange a round: a site evaluates the adapter that it receives, then trains it, and answers with both.
So the result of round r (r = 0 is zero-shot) is known when the answers of round r + 1 arrive; a closing EVALUATE
completes the last one. Sites that do not train in a round evaluate in it: rounds are compared on the same sites.

After each round the watcher gets the `RunState`; a run resumed from it ends with an identical result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import Report, privacy, records
from fedclip_flwr.exchange.secure.protocol import MaskingError
from fedclip_flwr.learning import choosing
from fedclip_flwr.learning.metrics import Quality
from fedclip_flwr.learning.recipes import recipe_of, starts_as_zero_shot
from fedclip_flwr.learning.selection import BLENDS, better, chosen
from fedclip_flwr.server import noised
from fedclip_flwr.server.nodes import Nodes
from fedclip_flwr.server.results import Outcome, RoundResult, RunState
from fedclip_flwr.server.secure_sum import SecureSum, secure_sum
from fedclip_flwr.server.strategy import AdapterFedAvg

Configure = Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]]
Reports = Mapping[str, Report]
Unseen = Callable[[State, float], Mapping[str, Quality]]
"""The quality of an adapter, with a blend, on the held-out domains that the server has."""
ATTEMPTS = 3
"""A round that gets too few answers is tried this many times; then the run fails."""


class Watcher(Protocol):
    """Called as a run proceeds."""

    def on_result(self, result: RoundResult) -> None:
        """The result of a round is known."""

    def on_selected(self, number: int, state: State, blend: float) -> None:
        """The adapter of this round, with this blend, is the best so far."""

    def on_complete(self, state: RunState) -> None:
        """A round is complete; the run can be resumed from here."""


class Attempt(NamedTuple):
    """One attempt at a round: the average (None if nothing was trained), the reports of those that did and didn't
    train, and why no sum of masked answers could be made."""

    aggregate: ArrayRecord | None
    trained: Reports
    evaluated: Reports
    why: str = ""


class RoundLoop:
    """Runs the rounds from the adapter `start`, or resumes from a run's state; `run` does it all."""

    def __init__(
        self,
        nodes: Nodes,
        strategy: AdapterFedAvg,
        settings: Settings,
        start: State,
        unseen: Unseen,
        watcher: Watcher,
        resumed: RunState | None = None,
        known: Reports | None = None,
    ) -> None:
        """`known` are reports on `start` of sites that need not be asked for them."""
        self._nodes, self._strategy, self._settings = nodes, strategy, settings
        self._start, self._unseen, self._watcher = start, unseen, watcher
        self._recipe = recipe_of(settings)
        self._at = resumed or RunState(0, start, start, bytes=nodes.traffic.both)  # bytes of the hellos
        self._resumed, self._known = resumed is not None, known or {}

    def run(self) -> Outcome:
        """Runs all rounds and the closing evaluations."""
        self._begin()
        for number in range(self._at.round + 1, self._settings.rounds + 1):
            if self._stops_early():
                break
            self._round(number)
        if self._settings.one_round_choose and self._at.round:
            self._at.state = self._chosen()
        zero, best = self._record(self._evaluate(self._at.round, self._at.state, self._nodes.good()))
        return self._finish(zero, best)

    def _begin(self) -> None:
        at, settings = self._at, self._settings
        recount = self._resumed and settings.dp == "local"
        if recount:  # the interrupted round may have used all its attempts
            spoiled = len(self._nodes.trained) if settings.secure_aggregation else 0  # attempts that expose a site
            self._nodes.trained.update(dict.fromkeys(self._nodes.trained, ATTEMPTS + spoiled))
        at.epsilon = privacy.spent(settings, self._nodes.trained.values())
        if recount:
            self._watcher.on_complete(at)  # the run may be interrupted again
        if at.best:  # the interrupted run may have selected a later round, which was not completed
            self._watcher.on_selected(at.best.round, at.best_state, settings.trained_blend)

    def _stops_early(self) -> bool:
        """True if `early-stop` rounds have brought no gain; the result of the last round is not known yet."""
        at, patience = self._at, self._settings.early_stop
        return bool(patience and at.best and at.round - 1 - at.best.round >= patience)

    def _round(self, number: int) -> None:
        """Runs one round: sends the adapter, and aggregates the answers into the next one."""
        at, nodes = self._at, self._nodes
        nodes.meet(number)
        before, begun = nodes.traffic.both, time.monotonic()
        made = self._attempts(number)
        if made.aggregate is None:
            raise UserError("no site has an example to learn from: use more data or fewer sites")
        spent = nodes.traffic.both - before
        at.question_bytes += spent
        known = self._known if number == 1 else {}
        self._record({**known, **made.trained, **made.evaluated})  # of the adapter that they were sent, not of the next
        at.state = nodes.link.advance(records.read_adapter(made.aggregate, at.state), number)
        at.round, at.bytes, at.seconds = number, spent, time.monotonic() - begun
        at.epsilon = privacy.spent(self._settings, nodes.trained.values())
        self._watcher.on_complete(at)

    def _attempts(self, number: int) -> Attempt:
        """Repeats the round, as if it had not been tried, until enough sites have answered."""
        nodes, needed, memory = self._nodes, self._settings.least_sites, self._strategy.memory
        if self._settings.update and not self._settings.secure_aggregation:
            needed = min(needed, len(nodes.news))
        elif self._settings.update and not nodes.news:
            needed = 0
        tried, without = 0, frozenset[str]()
        while True:
            distrusted = len(nodes.distrusted)
            made = self._attempt(number, without)
            if len(made.trained) >= needed:
                return made
            tried += distrusted == len(nodes.distrusted)  # an attempt that exposed a spoiling site is not counted
            without = nodes.failed if self._settings.secure_aggregation else without
            few = f"round {number}: usable answers: {len(made.trained)}, min-sites = {needed} are needed"
            if tried == ATTEMPTS:
                raise UserError(f"{few}; it was tried {ATTEMPTS} times" + (f"; {made.why}" if made.why else ""))
            nodes.say(f"{few}; the round is repeated")
            self._strategy.memory = memory
            nodes.wait_for(needed, number)

    def _attempt(self, number: int, without: Collection[str]) -> Attempt:
        """Asks the sites, some to train and the others to evaluate, and averages what comes back."""
        settings, nodes, state = self._settings, self._nodes, self._at.state
        training, others = nodes.choose(settings.fraction_train, settings.seed, number, settings.least_sites, without)
        others = [node for node in others if nodes.names[node] not in self._known]
        nodes.trains(training)
        about = nodes, number, state, training, self._strategy, settings
        masks = secure_sum(settings)(*about) if settings.secure_aggregation and training else None
        evaluations: list[Message] = []
        try:
            training = masks.prepare() if masks else training
            asked = self._messages(self._strategy.configure_train, number, state, training, nodes.config())
            asked = [masks.address(message) for message in asked] if masks else asked
            asked += self._messages(self._strategy.configure_evaluate, number, state, others, nodes.config())
            self._at.questions += len(asked)
            aggregate = self._aggregate(number, _setting_aside(nodes.ask(number, asked, state), evaluations), masks)
        except MaskingError as error:
            nodes.say(f"round {number}: no sum can be made: {error}")
            return Attempt(None, {}, {}, str(error))
        reports = nodes.collect_reports(number, self._strategy)
        self._strategy.aggregate_evaluate(number, evaluations)
        return Attempt(aggregate, reports, nodes.collect_reports(number, self._strategy))

    def _aggregate(self, number: int, replies: Iterable[Message], masks: SecureSum | None) -> ArrayRecord | None:
        strategy = self._strategy
        if not masks:
            return strategy.aggregate_train(number, replies)[0]
        made = masks.aggregate(replies)
        return strategy.step(number, noised.of_sum(made, self._at.state, len(strategy.reports), self._settings))

    def _messages(
        self, configure: Configure, number: int, state: State, asked: Sequence[int], config: ConfigRecord
    ) -> list[Message]:
        """The strategy's messages to these nodes; Flower's strategies would wait if there were no nodes."""
        if not asked:
            return []
        made = configure(number, records.write_adapter(state), config, self._nodes.view(asked))
        return sorted(made, key=lambda message: message.metadata.dst_node_id)  # Flower's strategies shuffle them

    def _record(self, reports: Reports) -> tuple[RoundResult, RoundResult]:
        """The latest adapter's result, compared with the best so far; returns that of round 0, and the best."""
        at, blend = self._at, self._settings.trained_blend
        unseen = self._unseen(at.state, blend)
        result = self._with_reports(
            RoundResult(at.round, {}, unseen, at.bytes, at.seconds, epsilon=at.epsilon), reports
        )
        self._watcher.on_result(result)
        at.zero = at.zero or result
        if (
            at.best is None
            or at.best.round < self._recipe.first_choice
            or chosen(result.validations, at.best.validations, at.zero.validations, self._recipe)
        ):
            at.best, at.best_state = result, at.state
            self._watcher.on_selected(result.round, at.state, blend)
        return at.zero, at.best

    def _chosen(self) -> State:
        """The closed form with the constants that do best at the sites."""
        at, nodes = self._at, self._nodes
        reports = self._evaluate(at.round, at.state, nodes.good(without=nodes.by_role.holdouts), choose=True)
        found = choosing.best((report.validation.examples, report.choices) for report in reports.values())
        nodes.say(f"chosen by validation: {', '.join(f'{name} {value:g}' for name, value in found._asdict().items())}")
        return {**at.state, "constants": torch.tensor(found, dtype=torch.float64)}

    def _evaluate(
        self,
        number: int,
        state: State,
        asked: Sequence[int],
        *,
        personal: bool = False,
        blend: float | None = None,
        choose: bool = False,
    ) -> Reports:
        """The reports of these nodes on the adapter, or on those that they personalise from it (`personal`)."""
        config = self._nodes.config(personal, blend, choose)
        messages = self._messages(self._strategy.configure_evaluate, number, state, asked, config)
        self._strategy.aggregate_evaluate(number, self._nodes.ask(number, messages, state))
        return self._nodes.collect_reports(number, self._strategy)

    def _with_reports(self, result: RoundResult, reports: Reports) -> RoundResult:
        """The result with these reports, split into those of training sites and of holdout sites."""
        known = reports.keys() - {*self._nodes.leaving}
        sites, holdouts = ({name: reports[name] for name in sorted(known & of)} for of in self._nodes.by_role)
        return replace(result, reports=sites, holdouts=holdouts)

    def _with_absent_sites(self, result: RoundResult, state: State) -> RoundResult:
        """The result with the reports of sites that were absent in its round."""
        known = {**result.reports, **result.holdouts}
        asked = self._nodes.good(known)
        return self._with_reports(result, {**known, **self._evaluate(result.round, state, asked)})

    def _blended(self, result: RoundResult, state: State, blend: float) -> RoundResult:
        """The result with another share of the adapted feature."""
        reports = self._evaluate(result.round, state, self._nodes.good(), blend=blend)
        return self._with_reports(replace(result, unseen=self._unseen(state, blend)), reports)

    def _finish(self, zero: RoundResult, best: RoundResult) -> Outcome:
        """Completes the two results that are reported, chooses the blend, and lets the sites personalise."""
        at, settings, start = self._at, self._settings, self._start
        exact = starts_as_zero_shot(settings)
        zero_shot = self._with_absent_sites(zero, start) if exact else self._blended(zero, start, 0.0)
        adapted, blend = self._with_absent_sites(best, at.best_state), settings.trained_blend
        if settings.blend == "auto":
            adapted, blend = self._best_blend(adapted)
            self._watcher.on_selected(adapted.round, at.best_state, blend)
        personal: Reports = {}
        if settings.personalize:
            alone = self._nodes.good(without=self._nodes.by_role.holdouts)
            sent_blend = blend if blend != settings.trained_blend else None
            personal = self._evaluate(adapted.round, at.best_state, alone, personal=True, blend=sent_blend)
        per_question = at.question_bytes / max(at.questions, 1)
        return Outcome(at.round, zero_shot, adapted, blend, personal, at.best_state, per_question, at.epsilon)

    def _best_blend(self, full: RoundResult) -> tuple[RoundResult, float]:
        """The best share of the adapted feature by validation; the smallest of several that do as well."""
        best, share = full, 1.0
        for blend in sorted((blend for blend in BLENDS if blend < 1), reverse=True):
            found = self._blended(full, self._at.best_state, blend)
            if not better(best.validations, found.validations, self._recipe):
                best, share = found, blend
        return best, share


def _setting_aside(replies: Iterable[Message], others: list[Message]) -> Iterator[Message]:
    """The replies to TRAIN as they come; the `others` are collected."""
    for reply in replies:
        if reply.metadata.message_type == MessageType.TRAIN:
            yield reply
        else:
            others.append(reply)
