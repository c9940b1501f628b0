"""What comes of the adapters that sites send in a round: their mean, in which no single one can do much harm.

An update is what a site has made of the adapter that it was sent: the difference of the two. Updates much longer than
the others' median are scaled down (norm bounding, arXiv 1911.07963, with a bound that follows from the round itself),
and those beyond all measure are left out. Each is added to a sum as it comes and let go of, so that memory does not
grow with the number of sites. As the median is known only at the end, there is a sum for each length, in steps of 19 %:
the bound is the next step, and what is longer comes out between that and the step below.

Of an even number of updates, two are in the middle. The shorter one sets the bound: so the longer half of the updates
can't raise it. The longer one says what is left out: so the shorter half can have the others scaled down, not left out.

`Held` keeps the updates instead, for those of Flower's strategies that compare them with each other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median_high, median_low
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedclip_flwr.base import UserError
from fedclip_flwr.base.tensors import State, length_of

STEPS = 4
"""Lengths that are told apart within a doubling."""
BEYOND = 10.0
"""So many times as long as what is scaled down: left out."""


class Mean:
    """The weighted mean of adapters' tensors, each added as it comes and let go of.

    The sum counts whole multiples of 2⁻³⁶. So the order of arrival changes no bit, and float32's precision is kept. Its
    64 bits have room for weights of 2¹² in all. What comes later is split into 40 lower bits and the upper rest, and
    each part has its own sum: together they have room for 4 million sites of 10⁹ examples each. A state may belong to a
    group, whose part of the mean can be scaled in the end.
    """

    LARGEST = 2.0**14
    """Of a tensor's numbers: so large a one would not fit."""
    UNIT, ROOM, SPLIT = 2.0**36, 2.0**12, 40

    @classmethod
    def check(cls, state: Mapping[str, Tensor]) -> None:
        """Raises unless the state can be added."""
        for name, tensor in state.items():
            least, most = tensor.aminmax()
            if not (least > -cls.LARGEST and most < cls.LARGEST):  # also where one is not a number
                raise UserError(f"{name}: numbers of {cls.LARGEST:,.0f} and more can't be averaged")

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self._like, self._room = like, self.ROOM
        self._parts = {name: torch.empty_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
        self._whole = {name: torch.empty_like(tensor, dtype=torch.int64) for name, tensor in like.items()}
        self._lower, self._upper = (defaultdict[int, State](self._zeros) for _ in range(2))
        self._weights: dict[int, float] = {}

    def _zeros(self) -> State:
        return {name: torch.zeros_like(whole) for name, whole in self._whole.items()}

    def add(self, state: Mapping[str, Tensor], weight: float = 1.0, group: int = 0) -> None:
        fits = weight <= self._room
        if fits:
            self._room -= weight
        for name, lower in self._lower[group].items():  # in memory that is used again: to get new one takes longer
            part = self._parts[name].copy_(state[name]).mul_(weight * self.UNIT).round_()
            if not fits:
                self._upper[group][name] += self._whole[name].copy_(part.mul_(2.0**-self.SPLIT))
                part.frac_().mul_(2.0**self.SPLIT)
            lower += self._whole[name].copy_(part)
        self._weights[group] = self._weights.get(group, 0.0) + weight

    @property
    def weight(self) -> float:
        return math.fsum(self._weights.values())

    @property
    def value(self) -> State:
        return self.scaled({}, {})

    def scaled(self, shares: Mapping[int, float], base: Mapping[str, Tensor]) -> State:
        """The mean in which of some groups only such a share counts, the rest being the `base`; with 0 they are out."""
        kept = {group: shares.get(group, 1.0) for group in self._weights if shares.get(group, 1.0)}
        whole = math.fsum(self._weights[group] for group in kept) * self.UNIT
        mean = {}
        for name, like in self._like.items():
            total = self._sum_of([group for group in kept if kept[group] == 1], name)
            for group in sorted(group for group in kept if kept[group] != 1):
                total += kept[group] * self._sum_of([group], name)
                total += (1 - kept[group]) * self._weights[group] * self.UNIT * base[name].double()
            mean[name] = (total / whole).to(like.dtype)
        return mean

    def _sum_of(self, groups: Sequence[int], name: str) -> Tensor:
        """The groups' sum, to the same bits however it came to be split."""
        lower = sum((self._lower[group][name] for group in groups), self._whole[name].zero_())
        if not self._upper:
            return lower.double()
        upper = sum((self._upper[group][name] for group in groups if group in self._upper), lower >> self.SPLIT)
        return upper.double().mul_(2.0**self.SPLIT).add_(lower & (2**self.SPLIT - 1))


class Gathered(NamedTuple):
    """What came of a round's updates (none if there was none), and why those of some sites were left out."""

    state: State | None
    left_out: Mapping[str, str]
    scaled: Sequence[str] = ()


class Gathering(Protocol):
    """The updates of a round as they come."""

    def add(self, site: str, state: State, weight: float) -> None:
        """Takes in what the site has made; a `UserError` if that can't be used."""

    def close(self) -> Gathered:
        """What comes of all."""


Gather = Callable[[State], Gathering]
"""Begins a gathering, with what the sites were sent."""


def step_of(length: float) -> int:
    """Number n for the lengths from 2^((n - 1) / STEPS), exclusive, to 2^(n / STEPS)."""
    return math.ceil(math.log2(length) * STEPS)


class Lengths:
    """How long the updates of a round are, and what that means for each. `limit` is in times of their median; or 0."""

    UNMEASURED = -(2**15)

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._lengths: dict[str, float] = {}

    def measure(self, site: str, state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> int:
        """Takes note of the site's update; the number of the sum that it goes to."""
        Mean.check(state)
        length = length_of(state, base) if self._limit else 0.0
        if not length:  # who moves nowhere says nothing of how far one goes
            return self.UNMEASURED
        self._lengths[site] = length
        return step_of(length)

    def verdict(self) -> Verdict:
        if not self._lengths:
            return Verdict({}, {}, [])
        usual = median_low(self._lengths.values())
        longest = step_of(self._limit * usual)
        farthest = step_of(self._limit * median_high(self._lengths.values())) + STEPS * math.log2(BEYOND)
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
    """How much of the updates in a sum counts, where that is not the whole; who is left out, and who scaled down."""

    shares: Mapping[int, float]
    left_out: Mapping[str, str]
    scaled: Sequence[str]


class Sums:
    """The mean, with a limit to how long an update may be."""

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
    """All updates, scaled down or left out in the same way, from which a rule makes one."""

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
    """In the order of the sites' names, however they came."""
    for site in sorted(updates):
        step, update = updates[site]
        if share := shares.get(step, 1.0):
            yield {name: tensor * share for name, tensor in update.items()}


def bounded(claims: Mapping[str, float], most: float) -> dict[str, float]:
    """The sites' weights, none of them more than so many times their median: the lower one, as for lengths."""
    largest = most * median_low(claims.values()) if claims and most else math.inf
    return {site: min(claim, largest) for site, claim in claims.items()}
