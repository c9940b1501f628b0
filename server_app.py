"""The ServerApp: one run of a federation, from top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedclip_flwr.base import Settings, UserError, content
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import some
from fedclip_flwr.data import held_out
from fedclip_flwr.exchange import Session
from fedclip_flwr.exchange.link import Downlink, forget
from fedclip_flwr.features import Features, models
from fedclip_flwr.features.lora import step_memory
from fedclip_flwr.flower import lines
from fedclip_flwr.flower.grids import simulated
from fedclip_flwr.flower.serverapp import add_exit_handler, refuse
from fedclip_flwr.learning import Classes, Examples, Learner, examine
from fedclip_flwr.learning.metrics import Quality
from fedclip_flwr.learning.recipes import starts_as_zero_shot
from fedclip_flwr.report import writing
from fedclip_flwr.runs import console, saved
from fedclip_flwr.runs.checkpoint import Checkpoint
from fedclip_flwr.runs.directions import start_of
from fedclip_flwr.runs.folder import RunFolder
from fedclip_flwr.runs.ledger import Earlier, SumsOnDisk, read_sites
from fedclip_flwr.runs.opening import open_run
from fedclip_flwr.runs.summary import summary_of
from fedclip_flwr.server import RoundResult, RunState
from fedclip_flwr.server.loop import RoundLoop
from fedclip_flwr.server.nodes import Nodes
from fedclip_flwr.server.one_round import strategy_of
from fedclip_flwr.server.strategy import AdapterFedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    try:
        serve(grid, context.run_config)
    except UserError as error:
        refuse(error)


def serve(grid: Grid, run_config: Mapping[str, Any]) -> None:
    clock = Clock()
    lines.warn()
    settings, features, holdout = open_run(run_config)
    package = content.of_package(content.memory())
    earlier = Earlier.open(settings, features) if settings.update else None
    with RunFolder(settings, package) as folder:
        add_exit_handler(folder.stop)
        device = models.pick_device(settings.device)
        classes = features.classes.ready(device)
        unseen = encoded(grid, features, holdout, device)
        clock.encoded = time.monotonic()

        learner = earlier.start if earlier else start_of(settings, features)
        start = learner.on_cpu()
        session = Session(holdout or "", features.vocabulary, features.model_content or "", folder.run)
        link = Downlink(start, settings.codec, settings.seed)
        nodes = nodes_of(grid, link, session, settings, package, earlier, learner)
        names = session.vocabulary.class_names
        ledger = ledger_of(folder, settings, names, earlier)
        strategy = strategy_of(settings, start, nodes.names, nodes.examples, len(names), ledger)
        if before := folder.before:
            resume(folder, before, settings, session, nodes, strategy)
            clock.before = before.seconds
        elif not has_news(folder, settings, nodes, earlier):
            return
        folder.begin(nodes.failures, len(list(grid.get_node_ids())), simulated(grid))
        folder.trackers.begin(folder.run, folder.path, settings, folder.metrics)
        clock.met = time.monotonic()
        plan = settings, features, holdout, nodes.hellos.values(), start, folder.path
        console.say(console.plan(*plan, step_memory(learner, features, settings), nodes.frozen))
        resumed = [*before.resumed, before.state.round] if before else []
        if before:
            console.say(console.resuming(before.state.round, folder.with_other_package))
        console.say(console.heading(settings))

        def checkpoint(state: RunState) -> Checkpoint:
            if ledger:
                ledger.settle(strategy.given, nodes.hellos)
            made = state, link.residual, strategy.memory, nodes.record, session.key, clock.seconds()
            return Checkpoint(*made, resumed, folder.metrics)

        watch = Watch(folder, features, learner.frozen, settings, checkpoint)
        quality = Unseen(learner.to(device), classes, unseen)
        known = earlier.scores(nodes.unchanged) if earlier else {}
        loop = RoundLoop(nodes, strategy, settings, start, quality, watch, before.state if before else None, known)
        try:
            outcome = loop.run()
            summary = summary_of(outcome, nodes, holdout, features, settings, clock.seconds(), resumed)
            if earlier:
                summary |= earlier.changes(read_sites(folder.path), nodes.leaving)
            folder.finish(summary)
        except UserError as error:
            console.say("\n".join(console.left_out(nodes.failures)))
            raise UserError(f"{error}. {folder.how_to_resume}") from error
        if simulated(grid):
            forget(session.key)
        console.say(console.closing(summary, settings, holdout, outcome.adapted.validation is not None))
    console.say(writing.at_end(folder.path, features, holdout))  # after all else: the run is already complete
    console.say(f"Run folder: {folder.path}")


def ledger_of(
    folder: RunFolder, settings: Settings, class_names: Sequence[str], earlier: Earlier | None
) -> SumsOnDisk | None:
    """What keeps the sites' sums, with one round of exact sums."""
    if not settings.keeps_sums:
        return None
    if earlier:
        earlier.check()
    return SumsOnDisk(folder.path, class_names, earlier, folder.setting, settings.secure_aggregation)


def has_news(folder: RunFolder, settings: Settings, nodes: Nodes, earlier: Earlier | None) -> bool:
    """Waits for the sites; False if the run would make the result that is there already."""
    nodes.wait_for(settings.least_sites)
    try:
        check_news(folder, settings, nodes, earlier)
    except UserError:
        folder.discard()
        raise
    if earlier is None or nodes.news or not earlier.answers(settings):
        return True
    folder.discard()
    console.say(f"No site has anything new since {earlier.path.name}: there is no new version.")
    return False


def check_news(folder: RunFolder, settings: Settings, nodes: Nodes, earlier: Earlier | None) -> None:
    """Raises unless the sites that are to leave can, and the new total hides what each site gives."""
    if absent := [site for site in nodes.leaving if site not in nodes.news]:
        raise UserError(f"leave = {settings.leave!r}: {absent[0]} is not connected, or gave nothing to take back")
    if earlier and settings.secure_aggregation and nodes.news:
        nodes.totals = earlier.totals(folder.path)
        if shown := nodes.exposed(nodes.news, settings.least_sites):
            raise UserError(
                f"the new total, beside the earlier ones, would show the sums of {some(shown)}: wait until more sites "
                "have something new, or leave"
            )


def nodes_of(
    grid: Grid,
    link: Downlink,
    session: Session,
    settings: Settings,
    package: str,
    earlier: Earlier | None,
    learner: Learner,
) -> Nodes:
    """The sites of the run; the process can end while it waits for them."""
    nodes = Nodes(
        grid,
        link,
        session=session,
        package=package,
        plugins=settings.shared_packages,
        timeout=settings.round_timeout,
        say=console.say,
    )
    nodes.earlier = earlier.sites if earlier else {}
    nodes.leaving = settings.leaving
    nodes.frozen = learner.frozen if settings.start else {}
    if not settings.secure_aggregation:
        nodes.count({})
    add_exit_handler(nodes.end)
    return nodes


def encoded(grid: Grid, features: Features, holdout: str | None, device: torch.device) -> dict[str, Examples]:
    """The held-out domains that the server has; in a simulation, all domains are encoded first."""
    if simulated(grid) and not features.domains:
        raise UserError("data = 'none': simulated sites have no images of their own; set the data that they share")
    if simulated(grid):  # the sites share this machine's store; encoding here shows its progress
        for domain in features.domains:
            features.examples(domain)
    unseen = {d: features.examples(d).ready(device) for d in held_out(holdout, features.domains)}
    if unreadable := [domain for domain, examples in unseen.items() if not len(examples.labels)]:
        raise UserError(
            f"{unreadable[0]} is held out, but none of its images can be read; hold out another, or repair them"
        )
    if simulated(grid):
        torch.set_num_threads(1)  # from now on the sites need the cores
    return unseen


def resume(
    folder: RunFolder, before: Checkpoint, settings: Settings, session: Session, nodes: Nodes, strategy: AdapterFedAvg
) -> None:
    """Restores the state after the last complete round, and waits for the sites."""
    if before.session != session.key:
        raise UserError(f"resume = {settings.resume!r}: that run had another model or other classes")
    if nodes.frozen:
        made = saved.load_lora(folder.path)[0].state
        if not all(torch.equal(tensor, made[name]) for name, tensor in nodes.frozen.items()):
            raise UserError(
                f"start = {settings.start!r}: it has changed since the run began; restore it, or start a new run"
            )
    nodes.link.resume(before.state.state, before.residual)
    strategy.memory = before.strategy
    nodes.resume(before.nodes, settings.least_sites)


@dataclass
class Clock:
    """Seconds that the run has taken so far, including those before it was interrupted."""

    begun: float = field(default_factory=time.monotonic)
    encoded: float = 0.0
    met: float = 0.0
    before: Mapping[str, float] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        now = time.monotonic()
        spent = {"encode": self.encoded - self.begun, "rounds": now - self.met, "total": now - self.begun}
        return {key: value + self.before.get(key, 0.0) for key, value in spent.items()}


@dataclass(frozen=True)
class Unseen:
    """The quality of an adapter on the held-out domains that the server has."""

    learner: Learner
    classes: Classes
    domains: Mapping[str, Examples]

    def __call__(self, state: State, blend: float) -> dict[str, Quality]:
        self.learner.load_state_dict(state)
        self.learner.blend = blend
        return {domain: examine(self.learner, examples, self.classes) for domain, examples in self.domains.items()}


@dataclass(frozen=True)
class Watch:
    """Writes each round to the run folder, and shows it."""

    folder: RunFolder
    features: Features
    frozen: State
    settings: Settings
    checkpoint: Callable[[RunState], Checkpoint]

    def on_result(self, result: RoundResult) -> None:
        self.folder.line(result)
        console.say(console.line(result, "zero-shot" if starts_as_zero_shot(self.settings) else "start"))

    def on_selected(self, number: int, state: State, blend: float) -> None:
        self.folder.adapter(number, {**state, **self.frozen}, self.features, blend)

    def on_complete(self, state: RunState) -> None:
        self.folder.checkpoint(self.checkpoint(state))
