"""A whole federation in this process: the server's own loop, over a grid whose nodes are functions.

Sites answer with their usual code, one by one. For comparisons, notebooks and tests: nothing is written to disk.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data import Vocabulary, held_out, pick_holdout
from fedclip_flwr.exchange import Hello, Session
from fedclip_flwr.exchange.link import Downlink, SiteCache, StatesInMemory
from fedclip_flwr.exchange.records import write_hello
from fedclip_flwr.experiments.unseen import THIRDS, third, without
from fedclip_flwr.features import Features
from fedclip_flwr.flower.grids import Node, local_grid
from fedclip_flwr.learning import Classes, Examples, Learner, evaluate, examine
from fedclip_flwr.learning.metrics import Quality, Score, mean_accuracy
from fedclip_flwr.learning.recipes import new_part
from fedclip_flwr.server import Outcome, RoundResult, RunState
from fedclip_flwr.server.loop import RoundLoop
from fedclip_flwr.server.nodes import Nodes
from fedclip_flwr.server.one_round import OneRoundStrategy, strategy_of
from fedclip_flwr.site import Site, SiteContext
from fedclip_flwr.site.holdings import simulated_site
from fedclip_flwr.site.work import answer_evaluate, answer_train

Wrap = Callable[[str, Node], Node]
"""Replaces a site's node, given its name: for sites that misbehave."""


@dataclass(frozen=True)
class Accuracies:
    """Mean accuracies after `round` rounds: over the sites (`seen`, `validation`) and over the unseen domains.

    `tests` has the test score of each site and unseen domain, by name.
    """

    round: int
    seen: float | None
    validation: float | None
    unseen: float | None
    tests: Mapping[str, Score] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Result:
    """The accuracies after each round and of the selected round, with that round's blend and adapter.

    `bytes`: what all messages of the run weigh, there and back. `last`: the adapter after the last round. `noised`: the
    server's total with noise for each image, before anything is made of it.
    """

    rounds: list[Accuracies]
    selected: Accuracies
    blend: float
    state: State
    bytes: int
    last: State
    noised: State

    @property
    def zero_shot(self) -> Accuracies:
        """The accuracies before round 1 (with the recipe `paper` only close to zero-shot)."""
        return self.rounds[0]


def make_sites(
    features: Features,
    holdout: str = "auto",
    sites: int = 10,
    seed: int = 0,
    *,
    partition: str = "domain",
    alpha: float = 0.5,
    device: str | torch.device = "cpu",
) -> tuple[list[Site], dict[str, Examples]]:
    """The sites sorted by name, and the examples of what is held out: domains, or one of `unseen.THIRDS`."""
    if holdout in THIRDS:
        every, _ = make_sites(features, "", sites, seed, partition=partition, alpha=alpha, device=device)
        kept, examples = without(every, third(holdout, len(features.vocabulary.class_names), seed))
        return kept, {holdout: examples}
    unseen = pick_holdout(holdout, features.domains)
    how: dict[str, Any] = {"partition": partition, "alpha": alpha}
    made = [simulated_site(features, unseen, number, sites, seed, device, **how) for number in range(sites)]
    apart = {domain: features.examples(domain).ready(device) for domain in held_out(unseen, features.domains)}
    return sorted(made, key=lambda site: site.name), apart


def simulate(
    sites: Sequence[Site],
    classes: Classes,
    unseen: Mapping[str, Examples] | None = None,
    settings: Settings | None = None,
    *,
    start: Learner | None = None,
    test_every_round: bool = True,
    after_round: Callable[[], object] = lambda: None,
    wrap: Wrap = lambda name, node: node,
) -> Result:
    """Runs the federation that the settings describe, on these sites.

    `start` is the learner; a new adapter by default. Without `test_every_round`, test images are evaluated only at the
    start and in the selected round. `after_round` is called after each round.
    """
    settings = settings or Settings()
    classes = classes.ready(classes.text.device)
    learner = copy.deepcopy(start) if start else new_part(settings, classes)
    learner = learner.to(classes.text.device)
    if not any(len(site.train.labels) for site in sites):
        raise UserError("no site has an example to learn from: use more data or fewer sites")
    apart = dict(unseen or {})
    federation = _Federation(
        sites if test_every_round else [replace(site, test=site.test.rows(slice(0))) for site in sites],
        classes,
        apart if test_every_round else {},
        settings,
        learner,
        after_round,
        wrap,
        copy.deepcopy(learner),
    )
    outcome = federation.run()
    if test_every_round:
        rounds = [_accuracies(result) for result in federation.results]
        return Result(rounds, _accuracies(outcome.adapted), outcome.blend, outcome.state, *federation.seen)
    zero = accuracies_of(learner, sites, classes, apart, federation.results[0])
    learner.load_state_dict(outcome.state)
    learner.blend = outcome.blend
    selected = accuracies_of(learner, sites, classes, apart, outcome.adapted)
    return Result([zero], selected, outcome.blend, outcome.state, *federation.seen)


def accuracies_of(
    learner: Learner | None,
    sites: Sequence[Site],
    classes: Classes,
    unseen: Mapping[str, Examples],
    result: RoundResult | None = None,
) -> Accuracies:
    """The accuracies of a learner (None: the frozen CLIP) on test images; round and validation come from `result`."""
    seen = {site.name: evaluate(learner, site.test, classes) for site in sites}
    apart = {domain: evaluate(learner, examples, classes) for domain, examples in unseen.items()}
    validation = result.validation if result else mean_accuracy(evaluate(learner, s.validation, classes) for s in sites)
    means = mean_accuracy(seen.values()), validation, mean_accuracy(apart.values())
    return Accuracies(result.round if result else 0, *means, seen | apart)


def _accuracies(result: RoundResult) -> Accuracies:
    tests = {site: report.test.score for site, report in result.reports.items()}
    apart = {domain: quality.score for domain, quality in result.unseen.items()}
    return Accuracies(result.round, result.seen, result.validation, mean_accuracy(result.held_out), tests | apart)


@dataclass
class _Federation:
    """The server's side, with the sites as nodes; it watches its own run."""

    sites: Sequence[Site]
    classes: Classes
    unseen: Mapping[str, Examples]
    settings: Settings
    learner: Learner
    after_round: Callable[[], object]
    wrap: Wrap
    scratch: Learner
    results: list[RoundResult] = field(default_factory=list)
    bytes: int = 0
    last: State = field(default_factory=dict)
    noised: State = field(default_factory=dict)

    @property
    def seen(self) -> tuple[int, State, State]:
        return self.bytes, self.last, self.noised

    def run(self) -> Outcome:
        start, session = self.learner.on_cpu(), Session("", Vocabulary((), ()), "", "simulate")
        states = StatesInMemory()
        ordered = sorted(self.sites, key=lambda site: site.name)
        answering = {number: _SiteNode(self._context(site), states) for number, site in enumerate(ordered, 1)}
        grid = local_grid({number: self.wrap(one.context.site.name, one) for number, one in answering.items()})
        link = Downlink(start, self.settings.codec, self.settings.seed)
        nodes = Nodes(grid, link, session=session, package="", timeout=math.inf, say=lambda text: None)
        nodes.frozen = self.learner.frozen if self.settings.start else {}
        strategy = strategy_of(self.settings, start, nodes.names, nodes.examples)
        with _quiet():
            nodes.wait_for(self.settings.least_sites)
            outcome = RoundLoop(nodes, strategy, self.settings, start, self._quality, self).run()
        self.bytes = nodes.traffic.both
        if isinstance(strategy, OneRoundStrategy):
            self.noised = strategy.noised
        return outcome

    def _context(self, site: Site) -> _LocalContext:
        return _LocalContext(self.settings, site, self.classes, self.classes.text.device, self.learner, self.scratch)

    def _quality(self, state: State, blend: float) -> dict[str, Quality]:
        """The quality of an adapter on the unseen domains."""
        if not self.unseen:
            return {}
        learner = copy.deepcopy(self.learner)
        learner.load_state_dict(state)
        learner.blend = blend
        return {domain: examine(learner, examples, self.classes) for domain, examples in self.unseen.items()}

    def on_result(self, result: RoundResult) -> None:
        self.results.append(result)

    def on_selected(self, number: int, state: State, blend: float) -> None: ...

    def on_complete(self, state: RunState) -> None:
        self.last = state.state
        self.after_round()


@dataclass(frozen=True)
class _LocalContext(SiteContext):
    """A site whose examples are in memory; it learns a copy of the `template`.

    Sites answer one after the other, and a received state replaces all that was learnt: they share the `scratch` copy.
    """

    template: Learner
    scratch: Learner

    def start(self) -> State:
        return self.template.on_cpu()

    def blank(self) -> Learner:
        return self.scratch


class _SiteNode:
    """A site's answers to messages."""

    def __init__(self, context: _LocalContext, states: StatesInMemory) -> None:
        self.context, self._states = context, states
        self._memory: dict[str, ConfigRecord] = {}

    def __call__(self, message: Message) -> Message:
        return Message(self._answer(message.metadata.message_type, message.content), reply_to=message)

    def _answer(self, kind: str, content: RecordDict) -> RecordDict:
        context, settings = self.context, self.context.settings
        cache = SiteCache(self._states, settings.codec)
        if kind == MessageType.QUERY:
            return write_hello(self._hello())
        if kind == MessageType.TRAIN:
            memory = self._memory if settings.secure_aggregation else None
            return answer_train(content, context, cache, memory=memory)
        if kind == MessageType.EVALUATE:
            return answer_evaluate(content, context, cache)
        from fedclip_flwr.exchange.secure import site  # imports cryptography, which few runs need

        return site.STEPS[kind.removeprefix("query.")](content, self._memory)

    def _hello(self) -> Hello:
        site = self.context.site
        train, validation, test = (len(part.labels) for part in (site.train, site.validation, site.test))
        return Hello(site.name, site.role, site.domain, train, validation, test, classes=[], package="")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the messages of Flower's strategies about each round."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
