"""The server of a federation: one run, read from top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context
from flwr.common.exit import add_exit_handler
from flwr.serverapp import Grid, ServerApp

from fedclip_flwr.base import content
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data.holdout import held_out
from fedclip_flwr.exchange.link import Downlink, forget
from fedclip_flwr.exchange.session import Session
from fedclip_flwr.features import models
from fedclip_flwr.features.base import Features
from fedclip_flwr.features.opening import new_learner
from fedclip_flwr.flower.grids import simulated
from fedclip_flwr.learning.adapters import Adapter
from fedclip_flwr.learning.metrics import Quality
from fedclip_flwr.learning.training import examine
from fedclip_flwr.report import writing
from fedclip_flwr.runs import console
from fedclip_flwr.runs.checkpoint import Checkpoint
from fedclip_flwr.runs.folder import RunFolder
from fedclip_flwr.runs.opening import open_run
from fedclip_flwr.runs.summary import summary_of
from fedclip_flwr.server.loop import federate, refuse
from fedclip_flwr.server.nodes import Nodes
from fedclip_flwr.server.results import Line, Standing
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
    begun = time.monotonic()
    settings, features, holdout = open_run(run_config)
    package = content.of_package(content.memory())
    with RunFolder(settings, package) as folder:
        add_exit_handler(folder.stop)
        before = folder.before
        if simulated(grid) and not features.domains:
            raise UserError("data = 'none': simulated sites have no images of their own; name the data that they share")
        device = models.pick_device(settings.device)
        classes = features.classes.ready(device)
        if simulated(grid):  # the sites share this machine's store, and here the progress can be seen
            for domain in features.domains:
                features.examples(domain)
        unseen = {d: features.examples(d).ready(device) for d in held_out(holdout, features.domains)}
        if unreadable := [domain for domain, examples in unseen.items() if not len(examples.labels)]:
            raise UserError(
                f"{unreadable[0]} is held out, but none of its images can be read; hold out another, or mend them"
            )
        if simulated(grid):
            torch.set_num_threads(1)  # from now on the sites need the cores
        encoded = time.monotonic()

        learner = new_learner(settings, features)
        start = learner.on_cpu()
        learner.to(device)

        session = Session(holdout or "", features.vocabulary, features.model_content or "", folder.run)
        link = Downlink(start, settings.codec, settings.seed)
        nodes = Nodes(grid, link, session=session, package=package, timeout=settings.round_timeout, say=console.say)
        add_exit_handler(nodes.end)
        strategy = AdapterFedAvg(start, nodes.names, settings, nodes.examples, len(session.vocabulary.class_names))
        if before:
            if before.session != session.key:
                raise UserError(f"resume = {settings.resume!r}: that run's model or classes were others")
            link.go_on(before.standing.state, before.left)
            strategy.memory = before.strategy
            nodes.go_on(before.nodes, settings.least_sites)
        else:
            nodes.wait_for(settings.least_sites)
        folder.go_on(nodes.failures, len(list(grid.get_node_ids())))
        folder.trackers.begin(folder.run, folder.path, settings, folder.metrics)
        met = time.monotonic()
        console.say(console.plan(settings, features, holdout, nodes.hellos.values(), start, folder.path))
        if before:
            other = ", with another version of this package" if folder.with_other_package else ""
            console.say(f"going on after round {before.standing.round}{other}\n")
        console.say(console.heading(settings))

        resumed = [*before.resumed, before.standing.round] if before else []

        def seconds() -> dict[str, float]:
            """What the run has taken, with what it took before it was interrupted."""
            now = time.monotonic()
            spent = {"encode": encoded - begun, "rounds": now - met, "total": now - begun}
            return {key: value + (before.seconds[key] if before else 0.0) for key, value in spent.items()}

        def quality_unseen(state: State, blend: float) -> dict[str, Quality]:
            learner.load_state_dict(state)
            if isinstance(learner, Adapter):
                learner.blend = blend
            return {domain: examine(learner, examples, classes) for domain, examples in unseen.items()}

        def checkpoint(standing: Standing) -> Checkpoint:
            return Checkpoint(
                standing, link.left, strategy.memory, nodes.record, session.key, seconds(), resumed, folder.metrics
            )

        watch = Watch(folder, features, "zero-shot" if settings.starts_as_zero_shot else "start", checkpoint)
        standing = before.standing if before else None
        try:
            outcome = federate(nodes, strategy, settings, start, quality_unseen, watch, standing)
            summary = summary_of(outcome, nodes, holdout, features, settings, seconds(), resumed)
            folder.finish(summary)
        except UserError as error:
            console.say("\n".join(console.left_out(nodes.failures)))
            raise UserError(f"{error}. {folder.how_to_go_on}") from error
        if simulated(grid):
            forget(session.key)
        validated = outcome.adapted.validation is not None
        console.say(console.closing(summary, settings, holdout, validated))
    console.say(writing.at_end(folder.path, features, holdout))  # the run is complete, and everybody told
    console.say(f"Run folder: {folder.path}")


@dataclass(frozen=True)
class Watch:
    """Writes each round down and shows it."""

    folder: RunFolder
    features: Features
    start: str
    checkpoint: Callable[[Standing], Checkpoint]

    def line(self, line: Line) -> None:
        self.folder.line(line)
        console.say(console.line(line, self.start))

    def selected(self, number: int, state: State, blend: float) -> None:
        self.folder.adapter(number, state, self.features, blend)

    def complete(self, standing: Standing) -> None:
        self.folder.checkpoint(self.checkpoint(standing))
