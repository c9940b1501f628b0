"""A whole federation in one process, without Flower: the same learning and averaging, for comparisons and tests."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.base.settings import OPTIMIZED, Settings
from fedclip_flwr.base.tensors import State
from fedclip_flwr.data.holdout import held_out, pick_holdout
from fedclip_flwr.exchange.codecs import CODECS, wrap
from fedclip_flwr.exchange.privacy import at_site
from fedclip_flwr.features.base import Features
from fedclip_flwr.learning.adapters import Adapter, new_adapter
from fedclip_flwr.learning.base import Classes, Examples, Learner
from fedclip_flwr.learning.metrics import Score, mean_accuracy
from fedclip_flwr.learning.recipes import RECIPES
from fedclip_flwr.learning.selection import BLENDS, better, chosen, drawn_by_lot
from fedclip_flwr.learning.training import evaluate
from fedclip_flwr.server.averaging import bounded
from fedclip_flwr.server.gathering import gather_of
from fedclip_flwr.site.holdings import Site, simulated_site
from fedclip_flwr.site.work import learn


@dataclass(frozen=True)
class Line:
    """What is learnt after so many rounds: mean accuracies over the sites, and over the unseen domains.

    `tests` has the score of each of them, by name.
    """

    round: int
    seen: float | None
    validation: float | None
    unseen: float | None
    tests: Mapping[str, Score] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Result:
    """The lines of the rounds, the selected one, with its blend where that was chosen, and that round's state."""

    lines: list[Line]
    selected: Line
    blend: float
    state: dict[str, Tensor]

    @property
    def zero_shot(self) -> Line:
        """The line before the first round (with the recipe `paper`: next to zero-shot)."""
        return self.lines[0]


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
    """The sites in the order of their names, and the domains that none of them holds."""
    unseen = pick_holdout(holdout, features.domains)
    how: dict[str, Any] = {"partition": partition, "alpha": alpha}
    made = [simulated_site(features, unseen, number, sites, seed, device, **how) for number in range(sites)]
    apart = {domain: features.examples(domain).ready(device) for domain in held_out(unseen, features.domains)}
    return sorted(made, key=lambda site: site.name), apart


class Hostile(Protocol):
    """Sites that do not do what they should."""

    def sends(self, number: int, site: str, state: State, received: State) -> State:
        """What the site sends in a round in which it should have sent this state."""

    def claims(self, site: str, score: Score) -> Score:
        """What the site says of its validation images, of which this is true."""


def tested(
    learner: Learner | None,
    sites: Sequence[Site],
    classes: Classes,
    unseen: Mapping[str, Examples],
    number: int,
    validated: Mapping[str, Score],
) -> Line:
    """How the learner (without one: CLIP itself) does on test images after so many rounds."""
    seen = {site.name: evaluate(learner, site.test, classes) for site in sites}
    apart = {domain: evaluate(learner, examples, classes) for domain, examples in unseen.items()}
    means = [mean_accuracy(scores.values()) for scores in (seen, validated, apart)]
    return Line(number, means[0], means[1], means[2], seen | apart)


def federate(
    sites: Sequence[Site],
    classes: Classes,
    unseen: Mapping[str, Examples] | None = None,
    settings: Settings | None = None,
    *,
    start: Learner | None = None,
    all_lines: bool = True,
    each_round: Callable[[], object] = lambda: None,
    hostile: Hostile | None = None,
) -> Result:
    """Runs the rounds; sites train one after the other, in the order of their names.

    Of the settings, those that say what is learnt and how are looked at. The `start` is a new adapter unless given.
    Without `all_lines` only zero-shot and the selected round are tested.
    """
    settings = settings or Settings()
    classes = classes.ready(classes.text.device)
    shared = copy.deepcopy(start) if start else new_adapter(settings, classes.dim).to(classes.text.device)
    able = {site.name: site for site in sites if len(site.train.labels)}
    if not able:
        raise UserError("no site has an example to learn from: use more data or fewer sites")

    def validate() -> dict[str, Score]:
        scores = {site.name: evaluate(shared, site.validation, classes) for site in sites}
        return {site: hostile.claims(site, score) for site, score in scores.items()} if hostile else scores

    def line(number: int, validated: Mapping[str, Score]) -> Line:
        return tested(shared, sites, classes, unseen or {}, number, validated)

    optimizer = None
    if settings.strategy in OPTIMIZED:
        from fedclip_flwr.server.strategy import optimizer_of  # not for all: it brings Flower

        logging.getLogger("flwr").setLevel(logging.WARNING)
        optimizer = optimizer_of(settings)
    left: dict[tuple[str, ...], State] = {}

    def carried(state: State, base: State, number: int, *way: str) -> State:
        """What arrives of the state at someone who has `base`."""
        if settings.codec not in CODECS:
            return state
        parcel = wrap(settings.codec, state, base, left.get(way, {}), seed_of(settings.seed, *way, number))
        left[way] = parcel.left
        return parcel.arrives

    def weight(site: Site) -> float:
        return float(len(site.train.labels)) if settings.site_weights == "examples" else 1.0

    gather, recipe = gather_of(settings), RECIPES[settings.recipe]
    lines: list[Line] = []
    selected, best, best_validated = 0, copy.deepcopy(shared.state_dict()), dict[str, Score]()
    zero = validate()
    for number in range(settings.num_server_rounds + 1):
        validated = validate() if number else zero
        if all_lines or number == 0:
            lines.append(line(number, validated))
        if selected < recipe.first_choice or chosen(validated, best_validated, zero, recipe):
            selected, best, best_validated = number, copy.deepcopy(shared.state_dict()), validated
        if number == settings.num_server_rounds:
            break
        before = shared.on_cpu()
        drawn = drawn_by_lot(able, settings.fraction_train, settings.seed, number + 1)
        weights = bounded({name: weight(able[name]) for name in drawn}, settings.max_site_weight)
        gathering = gather(before)
        for name in drawn:
            own = copy.deepcopy(shared)
            learn(own, able[name], classes, settings, number + 1)
            state = at_site(own.on_cpu(), before, settings)
            if hostile:
                state = hostile.sends(number + 1, name, state, before)
            gathering.add(name, carried(state, before, number + 1, "up", name), weights[name])
        averaged = gathering.close().state
        assert averaged is not None  # there is someone who learns
        averaged = optimizer.step(number + 1, before, averaged) if optimizer else averaged
        shared.load_state_dict(carried(averaged, before, number + 1, "down"))
        each_round()
    shared.load_state_dict(best)
    if isinstance(shared, Adapter) and settings.blend == "auto":
        blend, shared.blend = 1.0, 1.0
        for shared.blend in sorted(BLENDS, reverse=True):  # of several that do as well, the smallest
            if not better(best_validated, validated := validate(), recipe):
                blend, best_validated = shared.blend, validated
        shared.blend = blend
        return Result(lines, line(selected, best_validated), blend, best)
    best_line = lines[selected] if all_lines else line(selected, best_validated)
    return Result(lines, best_line, settings.trained_blend, best)
