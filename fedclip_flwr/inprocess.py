"""A whole federation in one process, without Flower: the same learning and averaging, for comparisons and tests."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedclip_flwr.adapters import Adapter
from fedclip_flwr.codecs import CODECS, State, wrap
from fedclip_flwr.config import Settings
from fedclip_flwr.data import pick_holdout
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import Features
from fedclip_flwr.learning import (
    BLENDS,
    RECIPES,
    Classes,
    Examples,
    Learner,
    Mean,
    best_blend,
    best_round,
    evaluate,
    seed_of,
)
from fedclip_flwr.metrics import mean_accuracy
from fedclip_flwr.sites import Site, drawn_by_lot, learn, new_adapter, simulated_site


@dataclass(frozen=True)
class Line:
    """What is learnt after so many rounds: mean accuracies over the sites, and that of the unseen domain."""

    round: int
    seen: float | None
    validation: float | None
    unseen: float | None


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
) -> tuple[list[Site], Examples | None]:
    """The sites in the order of their names, and the domain that none of them holds."""
    unseen = pick_holdout(holdout, features.domains)
    how: dict[str, Any] = {"partition": partition, "alpha": alpha}
    made = [simulated_site(features, unseen, number, sites, seed, device, **how) for number in range(sites)]
    return sorted(made, key=lambda site: site.name), features.examples(unseen).ready(device) if unseen else None


def federate(
    sites: Sequence[Site],
    classes: Classes,
    unseen: Examples | None = None,
    settings: Settings | None = None,
    *,
    start: Learner | None = None,
    all_lines: bool = True,
    each_round: Callable[[], object] = lambda: None,
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

    def mean(parts: list[Examples]) -> float | None:
        return mean_accuracy(evaluate(shared, part, classes) for part in parts)

    def line(number: int) -> Line:
        return Line(
            number,
            seen=mean([s.test for s in sites]),
            validation=mean([s.validation for s in sites]),
            unseen=evaluate(shared, unseen, classes).accuracy if unseen else None,
        )

    optimizer = None
    if settings.strategy not in ("fedavg", "fedprox"):
        from fedclip_flwr.strategy import optimizer_of  # not for all: it brings Flower

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

    lines: list[Line] = []
    validation: list[float | None] = []
    for number in range(settings.num_server_rounds + 1):
        if tested := all_lines or number == 0:
            lines.append(line(number))
        validation.append(lines[-1].validation if tested else mean([s.validation for s in sites]))
        selected = best_round(validation, RECIPES[settings.recipe].first_choice)
        if selected == number:
            best = copy.deepcopy(shared.state_dict())
        if number == settings.num_server_rounds:
            break
        before = copy.deepcopy(shared.state_dict())
        weights = {name: weight(site) for name, site in able.items()}
        average = Mean(before, sum(weights.values()))
        for name in drawn_by_lot(able, settings.fraction_train, settings.seed, number + 1):
            own = copy.deepcopy(shared)
            learn(own, able[name], classes, settings, number + 1)
            average.add(carried(own.state_dict(), before, number + 1, "up", name), weights[name])
        averaged = optimizer.step(number + 1, before, average.value) if optimizer else average.value
        shared.load_state_dict(carried(averaged, before, number + 1, "down"))
        each_round()
    shared.load_state_dict(best)
    if isinstance(shared, Adapter) and settings.blend == "auto":
        by_blend: dict[float, Line] = {}
        for shared.blend in BLENDS:
            by_blend[shared.blend] = line(selected)
        blend = best_blend({share: tried.validation for share, tried in by_blend.items()})
        return Result(lines, by_blend[blend], blend, best)
    return Result(lines, lines[selected] if all_lines else line(selected), settings.trained_blend, best)
