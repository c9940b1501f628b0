"""A whole federation in one process, without Flower: the same learning and averaging, for benchmarks and tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedclip_flwr.adapters import Adapter, make_adapter
from fedclip_flwr.data import pick_holdout
from fedclip_flwr.errors import UserError
from fedclip_flwr.features import Features
from fedclip_flwr.learning import (
    RECIPES,
    Classes,
    Examples,
    average,
    best_round,
    evaluate,
    seed_of,
    train,
)
from fedclip_flwr.metrics import mean_accuracy
from fedclip_flwr.sites import Site, simulated_site


@dataclass(frozen=True)
class Line:
    """The adapter after so many rounds: mean accuracies over the sites, and that of the unseen domain."""

    round: int
    seen: float
    validation: float | None
    unseen: float | None


@dataclass(frozen=True)
class Result:
    """Every round's line, which of them was selected, and that round's adapter."""

    lines: list[Line]
    selected: Line
    adapter: dict[str, Tensor]

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
) -> tuple[list[Site], Examples | None]:
    """The sites in the order of their names, and the domain that none of them holds."""
    unseen = pick_holdout(holdout, features.domains)
    how: dict[str, Any] = {"partition": partition, "alpha": alpha}
    made = [simulated_site(features, unseen, number, sites, seed, **how) for number in range(sites)]
    return sorted(made, key=lambda site: site.name), features.examples(unseen).ready() if unseen else None


def federate(
    sites: Sequence[Site],
    classes: Classes,
    unseen: Examples | None = None,
    *,
    kind: str = "attention",
    rank: int = 4,
    blend: float = 1.0,
    recipe: str = "default",
    learning_rate: float = 0.0,
    rounds: int = 20,
    epochs: int = 1,
    batch_size: int = 32,
    seed: int = 0,
) -> Result:
    """Runs the rounds; sites train one after the other, in the order of their names."""
    how = RECIPES[recipe]
    dim = classes.text.shape[1]
    shared = make_adapter(kind, dim, rank=rank, blend=blend, identity=how.identity, seed=seed)
    classes = classes.ready()
    learners = sorted((s for s in sites if len(s.train.labels)), key=lambda s: s.name)
    if not learners:
        raise UserError("no site has an example to learn from: use more data or fewer sites")
    lines: list[Line] = []
    for number in range(rounds + 1):
        lines.append(_line(number, shared, sites, classes, unseen))
        if best_round([line.validation for line in lines]) == number:
            best = copy.deepcopy(shared.state_dict())
        if number == rounds:
            break
        answers = []
        for site in learners:
            own = copy.deepcopy(shared)
            train(
                own,
                site.train,
                classes,
                how,
                learning_rate=learning_rate or how.rate(kind, dim),
                epochs=epochs,
                batch_size=batch_size,
                seed=seed_of(seed, "train", site.name, number + 1),
            )
            answers.append(own.state_dict())
        shared.load_state_dict(average(answers))
    return Result(lines, lines[best_round([line.validation for line in lines])], best)


def _line(number: int, adapter: Adapter, sites: Sequence[Site], classes: Classes, unseen: Examples | None) -> Line:
    def mean(parts: list[Examples]) -> float | None:
        return mean_accuracy(evaluate(adapter, part, classes) for part in parts)

    return Line(
        number,
        seen=mean([s.test for s in sites]) or 0.0,
        validation=mean([s.validation for s in sites]),
        unseen=evaluate(adapter, unseen, classes).accuracy if unseen else None,
    )


def pooled(sites: Sequence[Site]) -> list[Site]:
    """All sites' training rows in one place, their validation and test rows where they were: centralised training."""
    whole = Examples(*(torch.cat(parts) for parts in zip(*(s.train for s in sites), strict=True)))
    none = Examples(whole.features[:0], whole.labels[:0])
    return [Site("centralised", whole, none, none), *(Site(s.name, none, s.validation, s.test) for s in sites)]
