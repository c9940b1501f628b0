"""The one round of the closed form: sites get a basis, send sums, and the server adds them.

What follows from features of unit length is checked of each site's sums. A site that lies within these checks is not
found: docs/security.md says what it can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import ONE_ROUND
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import counted
from fedclip_flwr.exchange.records import read_adapter, write_adapter
from fedclip_flwr.learning.one_round import SUMS, symmetric
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
        self._gather = Total

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
        self._unit, self._full = unit_of(int(sent["bits"])), not len(sent["basis"])

    def add(self, site: str, state: Mapping[str, Tensor], weight: float) -> None:
        check(state, int(weight), self._unit, self._full)
        for name, total in self._total.items():
            total += state[name]

    def close(self) -> Gathered:
        return Gathered({**self._sent, **self._total} if self._total["counts"].any() else None, {})


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
