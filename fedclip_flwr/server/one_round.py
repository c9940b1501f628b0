"""The one round of the closed form: sites get a basis, send sums, and the server adds them.

What follows from features of unit length is checked of each site's sums. A site that lies within these checks is not
found: docs/security.md says what it can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedclip_flwr.base import Settings, UserError
from fedclip_flwr.base.settings import GRADIENT, ONE_ROUND
from fedclip_flwr.base.tensors import State
from fedclip_flwr.base.text import counted
from fedclip_flwr.exchange import Report
from fedclip_flwr.exchange.records import read_adapter, write_adapter
from fedclip_flwr.learning.gradient import COUNTED, WHOLE, OneGradient
from fedclip_flwr.learning.one_round import SUMS, OneRound, means_of, positive, symmetric
from fedclip_flwr.learning.sums import bits_for, unit_of
from fedclip_flwr.server.averaging import Gathered
from fedclip_flwr.server.strategy import AdapterFedAvg, LedgerError

if TYPE_CHECKING:
    from fedclip_flwr.exchange.private_sums import Hiding

MOST = 3.0
"""With a robust strategy, a site's images count for at most this many times the sites' median."""
SLACK = 1e-6
"""Rounding that the checks let pass, as a share of the number of images."""


class Given(NamedTuple):
    """What a site has given: the numbers of images and of classes in its sums, and the mark of its images."""

    images: int
    classes: int
    content: str


@contextmanager
def at_the_server() -> Iterator[None]:
    """An error with the ledger is not the site's whose sums are added."""
    try:
        yield
    except UserError as error:
        raise LedgerError(*error.args) from error


class Ledger:
    """What sites gave to an earlier version of the result, and what they give now. This one keeps nothing."""

    total: State | None = None
    """The earlier version's sums, over all its sites."""
    bits: int = 0

    @property
    def sites(self) -> Mapping[str, Given]:
        """The sites of the earlier version."""
        return {}

    def earlier(self, site: str) -> State:
        """The sums that this site gave to the earlier version."""
        raise LookupError(site)

    def keep(self, site: str, sums: Mapping[str, Tensor]) -> None:
        """Keeps the sums that this site gives now."""


class OneRoundStrategy(AdapterFedAvg):
    """As `AdapterFedAvg`, but the sites answer with sums, which are added exactly: every image counts the same.

    Sums take the place of those that the site gave to an earlier version, which the `ledger` has.
    """

    def __init__(
        self,
        like: State,
        names: Mapping[int, str],
        settings: Settings,
        claims: Callable[[str], float],
        classes: int | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        super().__init__(like, names, replace(settings, site_weights="examples", max_site_weight=0.0), claims, classes)
        share = share_of(settings)
        self._settings, self._ledger = settings, ledger or Ledger()
        self._form = OneGradient if settings.statistics == GRADIENT else OneRound
        self._hiding: Hiding | None = None
        self._plain: PlainTotal | None = None
        self._bits = self._ledger.bits or (int(like["bits"]) if settings.directions else 0)
        self._gather = partial(Total, ledger=self._ledger)
        if share is not None:
            self._gather = partial(Bounded, ledger=self._ledger, share=share)
        elif settings.hides_images or settings.statistics == GRADIENT:
            self._gather = self._noised

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        sent = read_adapter(arrays, self.like)
        asked = {self.names[node] for node in grid.get_node_ids()}
        others = sum(given.images for site, given in self._ledger.sites.items() if site not in asked)
        images = others + sum(int(self._claims(site)) for site in asked)
        bits = bits_for(images)
        if self._bits > bits:
            raise UserError("with these sites there are too many images for the unit of the earlier sums: start anew")
        bits = self._bits or bits
        config["bits"] = bits
        if "bits" in sent:
            sent["bits"] = torch.tensor(bits)
        if self._settings.hides_images:
            from fedclip_flwr.exchange.private_sums import Hiding  # imports an extra

            self._hiding = Hiding.of(self._settings, self.answered, sent[self._form.NEEDED], bits)
            self._hiding.check_blur(self.answered, images, len(asked))
        needed = {self._form.NEEDED: sent[self._form.NEEDED]}
        return self._addressed(server_round, write_adapter(needed), sent, config, grid)

    def counts(self, site: str, report: Report) -> bool:
        return super().counts(site, report) or site in self._ledger.sites

    @property
    def answered(self) -> State:
        return {name: self.like[name] for name in self._form.SENT}

    @property
    def noised(self) -> State:
        """The total with noise, before anything is made of it; empty without noise."""
        return self._plain.noised if self._plain else {}

    def _noised(self, sent: State) -> PlainTotal:
        self._plain = PlainTotal(sent, self.answered, self._hiding)
        return self._plain

    def of_total(self, sums: State, leaving: Collection[str] = ()) -> State:
        """The state with these sums of all sites in `reports`, of which none is known alone.

        They are added to those of the earlier version. Raises `UserError` unless these can then be the sums of the
        images that all its sites claim.
        """
        if self._hiding or self._form is OneGradient:
            whole = self._noised(self._sent)
            whole.add_all(sums, sum(int(self._claims(site)) for site in self.reports), len(self.reports))
            return whole.made()
        before, earlier = self._ledger.total, self._ledger.sites
        self.given = {site: (0 if site in leaving else int(self._claims(site)), 0) for site in self.reports}
        images = sum(count for count, _ in {**{site: of[:2] for site, of in earlier.items()}, **self.given}.values())
        total = Total(self._sent)
        total.add(
            "all sites", {name: tensor + before[name] for name, tensor in sums.items()} if before else sums, images
        )
        made = total.close().state
        if made is None:
            raise UserError("no images are left")
        return made


def strategy_of(
    settings: Settings,
    like: State,
    names: Mapping[int, str],
    claims: Callable[[str], float],
    classes: int | None = None,
    ledger: Ledger | None = None,
) -> AdapterFedAvg:
    """The strategy that the method asks for."""
    if settings.method == ONE_ROUND:
        return OneRoundStrategy(like, names, settings, claims, classes, ledger)
    return AdapterFedAvg(like, names, settings, claims, classes)


def share_of(settings: Settings) -> float | None:
    """The share of the sites that a robust strategy leaves out at each end; None for the exact sum."""
    return {"fedmedian": 0.5, "fedtrimmedavg": settings.hostile_share}.get(settings.strategy)


class Total:
    """The sum of the sites' sums. Whole numbers: it is the same to the bit in any order."""

    def __init__(self, sent: State, ledger: Ledger | None = None) -> None:
        self._sent, self._ledger = sent, ledger or Ledger()
        before = self._ledger.total or sent  # what is sent has no images
        self._total = {name: before[name].clone() for name in SUMS}
        self._contributions: dict[str, tuple[int, int]] = {}
        self._unit, self._full = unit_of(int(sent["bits"])), not len(sent["basis"])

    def add(self, site: str, state: Mapping[str, Tensor], weight: float) -> None:
        check(state, int(weight), self._unit, self._full)
        for name, total in self._total.items():
            total += state[name]
        with at_the_server():
            earlier = self._ledger.earlier(site) if site in self._ledger.sites else {}
            self._ledger.keep(site, state)
        for name, tensor in earlier.items():
            self._total[name] -= tensor
        self._contributions[site] = contribution(state)

    def close(self) -> Gathered:
        made = {**self._sent, **self._total} if self._total["counts"].any() else None
        return Gathered(made, {}, contributions=self._contributions)


class PlainTotal:
    """A total of which only the sum is known later: one with noise that hides each image, or a gradient."""

    def __init__(self, sent: State, like: State, hiding: Hiding | None) -> None:
        self._sent, self._hiding = sent, hiding
        self._total = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        self._images = self._sites = 0
        self.noised: State = {}

    def add(self, site: str, state: Mapping[str, Tensor], weight: float) -> None:
        images = int(weight)
        if self._hiding and self._hiding.place != "central":
            self._hiding.check_length(state, images)
        elif "gradient" in state:
            check_gradient(state, images)
        else:
            check(state, images, unit_of(int(self._sent["bits"])), not len(self._sent["basis"]))
        self.add_all(state, images, 1)

    def add_all(self, sums: Mapping[str, Tensor], images: int, sites: int) -> None:
        """Adds the sums of so many sites."""
        for name, total in self._total.items():
            total += sums[name]
        self._images, self._sites = self._images + images, self._sites + sites

    def close(self) -> Gathered:
        return Gathered(self.made() if self._images else None, {})

    def made(self) -> State:
        """The state that follows from the total."""
        if self._hiding is None:
            return {**self._sent, **self._total, "images": torch.tensor(self._images)}
        self.noised = self._hiding.at_server(self._total)
        return {**self._sent, **self._hiding.made(self.noised, self._images, self._sites)}


class Bounded:
    """Sums in which no site decides: of each class and direction the trimmed mean, or the median, of what sites say.

    The share that is left out at each end is one of all sites, as all hostile ones may have the same class. A site's
    claim of images counts for at most `MOST` times the median, its mean of a class as that of one site. That is no
    longer the sum of all images, and no protection for a class that only one or two sites have.
    """

    def __init__(self, sent: State, share: float, ledger: Ledger | None = None) -> None:
        self._sent, self._ledger = sent, ledger or Ledger()
        self._share, self._unit = share, unit_of(int(sent["bits"]))
        self._full = not len(sent["basis"])
        self._sites: dict[str, Mapping[str, Tensor]] = {}

    def add(self, site: str, state: Mapping[str, Tensor], weight: float) -> None:
        check(state, int(weight), self._unit, self._full)
        with at_the_server():
            self._ledger.keep(site, state)
        self._sites[site] = state

    def close(self) -> Gathered:
        earlier = {site: self._ledger.earlier(site) for site in self._ledger.sites if site not in self._sites}
        if not (counted := {site: one for site, one in {**earlier, **self._sites}.items() if one["counts"].any()}):
            return Gathered(None, {})
        made = {**self._sent, **bounded_sums([counted[site] for site in sorted(counted)], self._share, self._unit)}
        return Gathered(made, {}, contributions={site: contribution(one) for site, one in self._sites.items()})


def bounded_sums(sites: Sequence[Mapping[str, Tensor]], share: float, unit: float) -> State:
    """Sums with the trimmed means of what these sites say; see `Bounded`."""
    cut = math.ceil(share * len(sites))
    each = [means_of(one["counts"], one["sums"], one["moments"], unit) for one in sites]
    counts = torch.stack([one.counts for one in each])
    usual = counts.sum(1).quantile(0.5, interpolation="lower")
    counts = counts * (MOST * usual / counts.sum(1)).clamp_max(1.0)[:, None]
    means = torch.zeros_like(each[0].classes)
    for number in range(counts.shape[1]):
        if len(own := [one.classes[number] for one in each if one.seen[number]]):
            means[number] = trimmed(torch.stack(own), cut)
    total = counts.sum(0).round()
    scatters = [scatter for one in each if (scatter := one.covariance()) is not None]
    within = positive(trimmed(torch.stack(scatters), cut)) if scatters else torch.zeros_like(each[0].moments)
    products = within * (total.sum() - (total > 0).sum()) + (total[:, None] * means).T @ means
    upper = torch.triu_indices(*products.shape)
    made = {"counts": total, "sums": total[:, None] * means / unit}
    made["moments"] = products[upper[0], upper[1]] / unit
    return {name: tensor.round().long() for name, tensor in made.items()}


def contribution(sums: Mapping[str, Tensor]) -> tuple[int, int]:
    """The numbers of images and of classes in a site's sums."""
    return int(sums["counts"].sum()), int(sums["counts"].count_nonzero())


def trimmed(values: Tensor, cut: int) -> Tensor:
    """The mean without so many values at each end, number by number; the median of too few."""
    cut = min(cut, (len(values) - 1) // 2)
    return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)


def check_gradient(sums: Mapping[str, Tensor], images: int) -> None:
    """Raises `UserError` unless a gradient can be that of so many images."""
    if int(sums["counts"].min()) < 0 or int(sums["counts"].sum()) != images * COUNTED:
        raise UserError(f"its counts are not those of {counted(images, 'image')}")
    if (found := float(torch.linalg.vector_norm(sums["gradient"].double())) / WHOLE) > images:
        raise UserError(f"its gradient is {found:.3g} long, expected at most {images:,}, one for each image")


def check(sums: Mapping[str, Tensor], images: int, unit: float, full: bool) -> None:
    """Raises `UserError` unless the sums can be those of so many features of unit length."""
    counts = sums["counts"]
    slack = SLACK * images
    least, most = map(int, counts.aminmax())  # the sum of huge counts may wrap around
    if not 0 <= least <= most <= images or int(counts.sum()) != images:
        raise UserError(f"its counts are of {counted(int(counts.sum()), 'image')}, expected {images:,}")
    totals, moments = sums["sums"].double() * unit, symmetric(sums["moments"].double() * unit)
    if (torch.linalg.vector_norm(totals, dim=1) > counts * (1 + SLACK) + slack * (counts > 0)).any():
        raise UserError("the sum of its features is longer than so many of unit length can be")
    trace = float(moments.trace())
    if trace > images + slack or (full and trace < images - slack):
        raise UserError(f"its second moments have a trace of {trace:,.6g}, expected that of {counted(images, 'image')}")
    within = moments - (totals / counts.clamp_min(1)[:, None]).T @ totals
    if torch.linalg.cholesky_ex(within + slack * torch.eye(len(within), dtype=torch.float64)).info:
        raise UserError("its second moments can't be those of features with these sums")
