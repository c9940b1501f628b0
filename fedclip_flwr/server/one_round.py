"""The one round of the closed form: sites get a basis, send sums, and the server adds them.

What follows from features of unit length is checked of each site's sums. A site that lies within these checks is not
found: docs/security.md says what it can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import counted
from fedclip_flwr.exchange.records import read_adapter, write_adapter
from fedclip_flwr.learning.one_round import SUMS, means_of, symmetric
from fedclip_flwr.learning.sums import bits_for, unit_of
from fedclip_flwr.server.averaging import Gathered
from fedclip_flwr.server.strategy import AdapterFedAvg

SLACK = 1e-6
"""Rounding that the checks let pass, as a share of the number of images."""


class OneRoundStrategy(AdapterFedAvg):
    """As `AdapterFedAvg`, but the sites answer with sums, which are added exactly: every image counts the same."""

    def __init__(
        self,
        like: State,
        names: Mapping[int, str],
        settings: Settings,
        claims: Callable[[str], float],
        classes: int | None = None,
    ) -> None:
        super().__init__(like, names, replace(settings, site_weights="examples", max_site_weight=0.0), claims, classes)
        share = {"fedmedian": 0.5, "fedtrimmedavg": settings.hostile_share}.get(settings.strategy)
        self._gather = Total if share is None else partial(Bounded, share=share)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        sent = read_adapter(arrays, self.like)
        images = sum(int(self._claims(self.names[node])) for node in grid.get_node_ids())
        config["bits"] = bits_for(images)
        sent["bits"] = torch.tensor(config["bits"])
        return self._addressed(server_round, write_adapter({"basis": sent["basis"]}), sent, config, grid)

    @property
    def answered(self) -> State:
        return {name: self.like[name] for name in SUMS}


def strategy_class(settings: Settings) -> type[AdapterFedAvg]:
    """The strategy that the method asks for."""
    return OneRoundStrategy if settings.method == ONE_ROUND else AdapterFedAvg


class Total:
    """The sum of the sites' sums. Whole numbers: it is the same to the bit in any order."""

    def __init__(self, sent: State) -> None:
        self._sent = sent
        self._total = {name: torch.zeros_like(sent[name]) for name in SUMS}
        self._contributions: dict[str, tuple[int, int]] = {}
        self._unit, self._full = unit_of(int(sent["bits"])), not len(sent["basis"])

    def add(self, site: str, state: Mapping[str, Tensor], weight: float) -> None:
        check(state, int(weight), self._unit, self._full)
        for name, total in self._total.items():
            total += state[name]
        self._contributions[site] = contribution(state)

    def close(self) -> Gathered:
        made = {**self._sent, **self._total} if self._total["counts"].any() else None
        return Gathered(made, {}, contributions=self._contributions)


class Bounded:
    """Sums in which no site decides: of each class and direction the trimmed mean, or the median, of what sites say.

    The share that is left out at each end is one of all sites, as all hostile ones may have the same class. A site's
    claim of images counts for at most `MOST` times the median, its mean of a class as that of one site. That is no
    longer the sum of all images, and no protection for a class that only one or two sites have.
    """

    MOST = 3.0

    def __init__(self, sent: State, share: float) -> None:
        self._sent, self._share, self._unit = sent, share, unit_of(int(sent["bits"]))
        self._full = not len(sent["basis"])
        self._sites: dict[str, Mapping[str, Tensor]] = {}

    def add(self, site: str, state: Mapping[str, Tensor], weight: float) -> None:
        check(state, int(weight), self._unit, self._full)
        self._sites[site] = state

    def close(self) -> Gathered:
        if not self._sites:
            return Gathered(None, {})
        cut = math.ceil(self._share * len(self._sites))
        found = [self._sites[site] for site in sorted(self._sites)]
        each = [means_of(one["counts"], one["sums"], one["moments"], self._unit) for one in found]
        counts = torch.stack([one.counts for one in each])
        usual = counts.sum(1).quantile(0.5, interpolation="lower")
        counts = counts * (self.MOST * usual / counts.sum(1)).clamp_max(1.0)[:, None]
        means = torch.zeros_like(each[0].classes)
        for number in range(counts.shape[1]):
            if len(own := [one.classes[number] for one in each if one.seen[number]]):
                means[number] = trimmed(torch.stack(own), cut)
        total = counts.sum(0).round()
        scatters = [scatter for one in each if (scatter := one.covariance()) is not None]
        within = positive(trimmed(torch.stack(scatters), cut)) if scatters else torch.zeros_like(each[0].moments)
        products = within * (total.sum() - (total > 0).sum()) + (total[:, None] * means).T @ means
        upper = torch.triu_indices(*products.shape)
        made = {"counts": total, "sums": total[:, None] * means / self._unit}
        made["moments"] = products[upper[0], upper[1]] / self._unit
        state = {**self._sent, **{name: tensor.round().long() for name, tensor in made.items()}}
        return Gathered(state, {}, contributions={site: contribution(one) for site, one in self._sites.items()})


def contribution(sums: Mapping[str, Tensor]) -> tuple[int, int]:
    """The numbers of images and of classes in a site's sums."""
    return int(sums["counts"].sum()), int(sums["counts"].count_nonzero())


def positive(matrix: Tensor) -> Tensor:
    """The matrix without its negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.as_tensor(vectors * values.clamp_min(0) @ vectors.T)


def trimmed(values: Tensor, cut: int) -> Tensor:
    """The mean without so many values at each end, number by number; the median of too few."""
    cut = min(cut, (len(values) - 1) // 2)
    return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)


def check(sums: Mapping[str, Tensor], images: int, unit: float, full: bool) -> None:
    """Raises `UserError` unless the sums can be those of so many features of unit length."""
    counts = sums["counts"]
    slack = SLACK * images
    if int(counts.min()) < 0 or int(counts.sum()) != images:
        raise UserError(f"its counts are of {counted(int(counts.sum()), 'image')}, it said {images:,}")
    totals, moments = sums["sums"].double() * unit, symmetric(sums["moments"].double() * unit)
    if (torch.linalg.vector_norm(totals, dim=1) > counts * (1 + SLACK) + slack * (counts > 0)).any():
        raise UserError("the sum of its features is longer than so many of unit length can be")
    trace = float(moments.trace())
    if trace > images + slack or (full and trace < images - slack):
        raise UserError(f"its second moments have a trace of {trace:,.6g}, expected that of {counted(images, 'image')}")
    within = moments - (totals / counts.clamp_min(1)[:, None]).T @ totals
    if torch.linalg.cholesky_ex(within + slack * torch.eye(len(within), dtype=torch.float64)).info:
        raise UserError("its second moments can't be those of features with these sums")
