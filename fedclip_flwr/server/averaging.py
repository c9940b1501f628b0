"""The mean of the adapters that sites send in a round, with a bound on the influence of each.

An update is the difference between the adapter that a site returns and the one that it was sent. Updates much longer
than the median are scaled down (norm bounding, arXiv 1911.07963, with a bound that follows from the round itself), and
far longer ones are left out. Each update is added to a sum on arrival and then freed, so that memory does not grow with
the number of sites. The median is known only at the end, so there is a sum for each range of lengths, in steps of 19 %.
The bound is rounded up to the next step, and a longer update ends between the bound and the step below.

An even number of updates has two medians. The lower one sets the bound, so the longer half of the updates can't raise
it. The upper one decides what is left out, so the shorter half can have the others scaled down, but not left out.

`Held` keeps the updates instead, for Flower's strategies that compare them with each other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median_high, median_low
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedclip_flwr.base import UserError
from fedclip_flwr.base.tensors import State, length_of

STEPS = 4
"""Ranges of lengths per doubling."""
CUTOFF = 10.0
"""An update is left out if it is longer than this many times the bound (by the upper median)."""


class Mean:
    """The weighted mean of adapters' tensors, each added on arrival and then freed.

    The sum counts whole multiples of 2⁻³⁶. So the order of arrival changes no bit, and float32's precision is kept. Its
    64 bits have room for a total weight of 2¹². Later states are split into the lower 40 bits and the upper rest, each
    with its own sum: together they have room for 4 million sites of 10⁹ examples each. A state may belong to a group,
    whose part of the mean can be scaled at the end.
    """

    LARGEST = 2.0**14
    """A tensor's numbers must be smaller in magnitude, or they could overflow the sum."""
    UNIT, ROOM, SPLIT = 2.0**36, 2.0**12, 40

    @classmethod
    def check(cls, state: Mapping[str, Tensor]) -> None:
        """Raises `UserError` if the state can't be added."""
        for name, tensor in state.items():
            least, most = tensor.aminmax()
            if not (least > -cls.LARGEST and most < cls.LARGEST):  # NaN, too
                raise UserError(f"{name}: expected numbers below {cls.LARGEST:,.0f} in magnitude")

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self._like, self._room = like, self.ROOM
        self._parts = {name: torch.empty_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
        self._integers = {name: torch.empty_like(tensor, dtype=torch.int64) for name, tensor in like.items()}
        self._lower, self._upper = (defaultdict[int, State](self._zeros) for _ in range(2))
        self._weights: dict[int, float] = {}

    def _zeros(self) -> State:
        return {name: torch.zeros_like(integers) for name, integers in self._integers.items()}

    def add(self, state: Mapping[str, Tensor], weight: float = 1.0, group: int = 0) -> None:
        fits = weight <= self._room
        if fits:
            self._room -= weight
        for name, lower in self._lower[group].items():  # buffers are reused: allocation takes longer
            part = self._parts[name].copy_(state[name]).mul_(weight * self.UNIT).round_()
            if not fits:
                self._upper[group][name] += self._integers[name].copy_(part.mul_(2.0**-self.SPLIT))
                part.frac_().mul_(2.0**self.SPLIT)
            lower += self._integers[name].copy_(part)
        self._weights[group] = self._weights.get(group, 0.0) + weight

    @property
    def weight(self) -> float:
        return math.fsum(self._weights.values())

    @property
    def value(self) -> State:
        return self.scaled({}, {})

    def scaled(self, shares: Mapping[int, float], base: Mapping[str, Tensor]) -> State:
        """The mean; of a group in `shares` that share counts, and `base` for the rest. With 0 it is left out."""
        kept = {group: shares.get(group, 1.0) for group in self._weights if shares.get(group, 1.0)}
        weight = math.fsum(self._weights[group] for group in kept) * self.UNIT
        mean = {}
        for name, like in self._like.items():
            total = self._sum_of([group for group in kept if kept[group] == 1], name)
            for group in sorted(group for group in kept if kept[group] != 1):
                total += kept[group] * self._sum_of([group], name)
                total += (1 - kept[group]) * self._weights[group] * self.UNIT * base[name].double()
            mean[name] = (total / weight).to(like.dtype)
        return mean

    def _sum_of(self, groups: Sequence[int], name: str) -> Tensor:
        """The groups' sum, bit for bit the same however it was split."""
        lower = sum((self._lower[group][name] for group in groups), self._integers[name].zero_())
        if not self._upper:
            return lower.double()
        upper = sum((self._upper[group][name] for group in groups if group in self._upper), lower >> self.SPLIT)
        return upper.double().mul_(2.0**self.SPLIT).add_(lower & (2**self.SPLIT - 1))


class Gathered(NamedTuple):
    """The aggregate of a round's updates (None without any), the sites left out with the reason, and those scaled.

    `contributions`: the numbers of images, and of classes that have some, in each site's sums.
    """

    state: State | None
    left_out: Mapping[str, str]
    scaled: Sequence[str] = ()
    contributions: Mapping[str, tuple[int, int]] = MappingProxyType({})


class Gathering(Protocol):
    """Aggregates the updates of a round as they arrive."""

    def add(self, site: str, state: State, weight: float) -> None:
        """Adds the site's trained state; raises `UserError` if it is unusable."""

    def close(self) -> Gathered:
        """The aggregate of all."""


Gather = Callable[[State], Gathering]
"""Begins a gathering; gets the state that the sites were sent."""


def step_of(length: float) -> int:
    """The number n of the range from 2^((n - 1) / STEPS), exclusive, to 2^(n / STEPS)."""
    return math.ceil(math.log2(length) * STEPS)


class Lengths:
    """The lengths of a round's updates, and the verdict on each. `limit` is a multiple of their median; 0: no limit."""

    UNMEASURED = -(2**15)

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._lengths: dict[str, float] = {}

    def measure(self, site: str, state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> int:
        """Records the length of the site's update; returns the number of the sum to add it to."""
        Mean.check(state)
        length = length_of(state, base) if self._limit else 0.0
        if not length:  # an update of zero does not affect the median
            return self.UNMEASURED
        self._lengths[site] = length
        return step_of(length)

    def verdict(self) -> Verdict:
        if not self._lengths:
            return Verdict({}, {}, [])
        usual = median_low(self._lengths.values())
        longest = step_of(self._limit * usual)
        farthest = step_of(self._limit * median_high(self._lengths.values())) + STEPS * math.log2(CUTOFF)
        steps = {site: step_of(length) for site, length in self._lengths.items()}
        shares = {step: 2 ** ((longest - step) / STEPS) for step in {*steps.values()} if step > longest}
        shares |= {step: 0.0 for step in shares if step > farthest}
        why = "its update is {:,.0f} times as long as the sites' median, max-update-norm = {:g}"
        return Verdict(
            shares,
            {s: why.format(self._lengths[s] / usual, self._limit) for s, n in steps.items() if shares.get(n) == 0},
            sorted(site for site, step in steps.items() if 0 < shares.get(step, 1.0) < 1),
        )


class Verdict(NamedTuple):
    """The shares of the sums that do not count in full, the sites left out with the reason, and those scaled down."""

    shares: Mapping[int, float]
    left_out: Mapping[str, str]
    scaled: Sequence[str]


class Sums:
    """The mean, with a limit on the length of an update."""

    def __init__(self, sent: State, limit: float) -> None:
        self._sent, self._mean, self._lengths = sent, Mean(sent), Lengths(limit)

    def add(self, site: str, state: State, weight: float) -> None:
        self._mean.add(state, weight, self._lengths.measure(site, state, self._sent))

    def close(self) -> Gathered:
        verdict = self._lengths.verdict()
        made = self._mean.scaled(verdict.shares, self._sent) if self._mean.weight else None
        return Gathered(made, verdict.left_out, verdict.scaled)


Rule = Callable[[Sequence[State]], State]


class Held:
    """All updates, scaled down or left out as in `Sums`, then aggregated by a rule."""

    def __init__(self, sent: State, limit: float, rule: Rule) -> None:
        self._sent, self._lengths, self._rule = sent, Lengths(limit), rule
        self._updates: dict[str, tuple[int, State]] = {}

    def add(self, site: str, state: State, weight: float) -> None:
        step = self._lengths.measure(site, state, self._sent)
        self._updates[site] = step, {name: state[name] - tensor for name, tensor in self._sent.items()}

    def close(self) -> Gathered:
        verdict = self._lengths.verdict()
        updates = list(_scaled(self._updates, verdict.shares))
        if not updates:
            return Gathered(None, {})
        made = self._rule(updates)
        return Gathered({n: t + made[n] for n, t in self._sent.items()}, verdict.left_out, verdict.scaled)


def _scaled(updates: Mapping[str, tuple[int, State]], shares: Mapping[int, float]) -> Iterable[State]:
    """The updates that count, in the order of the sites' names, not of arrival."""
    for site in sorted(updates):
        step, update = updates[site]
        if share := shares.get(step, 1.0):
            yield {name: tensor * share for name, tensor in update.items()}


def bounded(claims: Mapping[str, float], most: float) -> dict[str, float]:
    """The sites' weights, each at most `most` times their lower median; 0: no limit."""
    largest = most * median_low(claims.values()) if claims and most else math.inf
    return {site: min(claim, largest) for site, claim in claims.items()}
