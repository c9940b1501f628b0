"""Membership inference: attacks that find out which images were trained on, and the ε that they rule out.

**The floor of ε** is that of an audit with one run (Steinke, Nasr and Jagielski, arXiv 2305.08846, theorem 5.2). Of
some images it is decided by lot whether they are trained on. An attacker who knows everything else guesses these bits
from the result, and may abstain. If the result is (ε, δ) private, no more guesses are right than of coins that fall
right with probability exp(ε) / (1 + exp(ε)), but for a term in δ: a larger number of right guesses rules out this ε.
The bound relies on the lot alone: not on how good the attack is, nor on images being independent of each other.

Deviations: how many guesses are made is one of `SHARES` of the bits, each tested at its part of the error. Where a bit
says which one of two images was trained on, the two results are `steps` = 2 neighbours apart.

**Attacks.** `drops`: the loss of an image is less than by a model that hasn't seen it. `unmixed`: the sums of
`method=one-round` and its gradient are linear in the bits, so least squares gives the bits back, of noised ones as well
as the noise allows. `by_gradients`: what an adapter has learnt is nearly so, if all other images are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.base.tensors import State
from fedclip_flwr.learning.base import Classes, Examples, Learner
from fedclip_flwr.learning.gradient import COUNT, PLACES, UNIT, OneGradient, factors
from fedclip_flwr.learning.noised_sums import most_of
from fedclip_flwr.learning.one_round import SUMS, ClosedForm, OneRound, symmetric
from fedclip_flwr.learning.sums import coordinates, shortened, sums_of, unit_of
from fedclip_flwr.learning.training import logits_of

SHARES = (1.0, 0.5, 0.25, 0.125)
"""How many of the bits are guessed, the most certain ones."""
MOST = 40.0
"""The largest ε that is looked for."""
ROWS = 256
"""Images whose losses are computed at once: they may be pixels."""
RIDGE = 1e-6
"""In mean squared lengths: keeps least squares solvable if two images are alike."""
FALSE = 0.01
BUCKETS = 2**16
"""Numbers that are kept of a gradient, at most."""
ALIKE = 0.1
"""The same for gradients, which explain an adapter only roughly."""


class Findings(NamedTuple):
    """The figures of an attack on `bits` bits, of which it guesses `guesses`, and `right` of them correctly.

    `auc` has the interval from `low` to `high`; `found` is the share of members found at a false rate of 1 %;
    `epsilon` is the floor.
    """

    bits: int
    guesses: int
    right: int
    auc: float
    low: float
    high: float
    found: float
    epsilon: float


def findings(
    inside: Tensor, outside: Tensor, signed: Tensor, delta: float, confidence: float, steps: int = 1
) -> Findings:
    """The figures of an attack's scores, which are higher for what it takes for trained on.

    `signed` has a number for each bit, drawn by lot: positive if the guess is right, 0 without
    a guess, and the larger, the more certain.
    """
    area = auc(inside, outside)
    return Findings(
        len(signed),
        int((signed != 0).sum()),
        int((signed > 0).sum()),
        area,
        *auc_interval(area, len(inside), len(outside), confidence),
        found_at(inside, outside, FALSE),
        floor_of(signed, delta, confidence, steps),
    )


def floor_of(signed: Tensor, delta: float, confidence: float, steps: int = 1) -> float:
    """The largest ε that is ruled out, with each number of guesses tested at its part of the error."""
    order = signed.abs().argsort(descending=True)
    error, best = (1 - confidence) / len(SHARES), 0.0
    for share in SHARES:
        guesses = math.ceil(share * len(signed))
        right = int((signed[order[:guesses]] > 0).sum())
        best = max(best, floor(right, guesses, len(signed), delta, error, steps))
    return best


def floor(right: int, guesses: int, bits: int, delta: float, error: float, steps: int = 1) -> float:
    """The ε up to which `right` or more right guesses have at most the probability `error`; 0 if there is none.

    The results of a bit's two values are `steps` neighbours apart.
    """

    def ruled_out(epsilon: float) -> bool:
        apart = delta * sum(math.exp(step * epsilon) for step in range(steps))
        return chance(right, guesses, bits, steps * epsilon, apart) <= error

    low, high = 0.0, MOST
    if not ruled_out(low):
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if ruled_out(middle) else (low, middle)
    return low


def chance(right: int, guesses: int, bits: int, epsilon: float, delta: float) -> float:
    """The highest probability of `right` or more right guesses that (ε, δ) privacy allows, about `bits` bits."""
    parts = binomial(guesses, 1 / (1 + math.exp(-epsilon)))
    below, most = 0.0, 0.0
    for fewer in range(1, right + 1):
        below += parts[right - fewer]
        most = max(most, below / fewer)
    return min(1.0, math.fsum(parts[right:]) + 2 * bits * delta * most)


def binomial(trials: int, probability: float) -> list[float]:
    """The probability of each number of successes."""
    yes, no = math.log(probability), math.log1p(-probability) if probability < 1 else -math.inf
    ways = math.lgamma(trials + 1)
    return [
        math.exp(
            ways - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * yes + ((trials - k) * no if k < trials else 0)
        )
        for k in range(trials + 1)
    ]


def auc(inside: Tensor, outside: Tensor) -> float:
    """How often a member's score is above another's; ties count half."""
    ordered = outside.sort().values.contiguous()
    below = torch.searchsorted(ordered, inside) + torch.searchsorted(ordered, inside, right=True)
    return float(below.double().mean()) / (2 * len(outside))


def auc_interval(area: float, inside: int, outside: int, confidence: float) -> tuple[float, float]:
    """Newcombe's interval (2006, method 5), as if images were independent; it is wide enough at 1, too."""
    z = torch.special.ndtri(torch.tensor((1 + confidence) / 2, dtype=torch.float64)).item()
    extra = (inside + outside) / 2 - 1

    def within(true: float) -> bool:
        spread = true * (1 - true) * (1 + extra * ((1 - true) / (2 - true) + true / (1 + true))) / (inside * outside)
        return abs(area - true) <= float(z) * math.sqrt(spread)

    return _edge(within, area, 0.0), _edge(within, area, 1.0)


def _edge(within: Callable[[float], bool], inner: float, outer: float) -> float:
    for _ in range(50):
        middle = (inner + outer) / 2
        inner, outer = (middle, outer) if within(middle) else (inner, middle)
    return inner


def found_at(inside: Tensor, outside: Tensor, false: float) -> float:
    """The share of members that score above all but this share of the others."""
    allowed = math.floor(false * len(outside))
    return float((inside > outside.sort(descending=True).values[allowed]).double().mean())


def losses(learner: Learner | None, examples: Examples, classes: Classes) -> Tensor:
    """The loss of each image, in float64 on the CPU."""
    found = []
    for rows in torch.split(torch.arange(len(examples.labels), device=examples.labels.device), ROWS):
        batch = examples.rows(rows)
        found.append(F.cross_entropy(logits_of(learner, batch, classes).double(), batch.labels, reduction="none").cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def drops(learner: Learner, unseeing: Learner | None, examples: Examples, classes: Classes) -> Tensor:
    """By how much the learner's loss is below that of one that has not seen the images."""
    return losses(unseeing, examples, classes) - losses(learner, examples, classes)


@dataclass(frozen=True)
class Directions:
    """Directions at right angles to each other, and of length 1: each has signs, in numbers of its own."""

    owners: Tensor
    signs: Tensor
    count: int

    @classmethod
    def drawn(cls, numbers: int, count: int, chance: torch.Generator) -> Directions:
        owners = torch.randperm(numbers, generator=chance) % count
        return cls(owners, torch.randint(0, 2, (numbers,), generator=chance) * 2.0 - 1, count)

    def one(self, number: int) -> Tensor:
        mine = self.owners == number
        return torch.where(mine, self.signs, 0.0) / mine.sum().sqrt()

    def along(self, vector: Tensor) -> Tensor:
        """How long the vector is in each direction."""
        found = torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.owners, self.signs * vector.double())
        return found / torch.bincount(self.owners, minlength=self.count).sqrt()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().cpu() for tensor in tensors])


def by_gradients(learner: Learner, unseeing: Learner, examples: Examples, classes: Classes) -> Tensor:
    """How much of each image is in what the learner has learnt beyond one that has seen all others."""
    parameters = list(unseeing.parameters())
    moved = flat(parameters) - flat(learner.parameters())
    kept = Directions.drawn(len(moved), min(len(moved), BUCKETS), torch.Generator().manual_seed(0))
    rows = []
    for one in torch.split(torch.arange(len(examples.labels), device=examples.labels.device), 1):
        image = examples.rows(one)
        loss = F.cross_entropy(unseeing.logits(image.features, classes), image.labels)
        rows.append(F.normalize(kept.along(flat(torch.autograd.grad(loss, parameters))), dim=0).float())
    found = torch.stack(rows)
    return unmixed((found @ found.T).double(), (found @ kept.along(moved).float()).double(), ALIKE)


class Sums(NamedTuple):
    """Sums as numbers: images of each class, their features, and the products of the features of all."""

    counts: Tensor
    sums: Tensor
    moments: Tensor

    @classmethod
    def of(cls, state: Mapping[str, Tensor], bits: int) -> Sums:
        counts, sums, moments = (state[name].cpu().double() for name in SUMS)
        return cls(counts, sums * unit_of(bits), symmetric(moments * unit_of(bits)))

    def less(self, other: Sums, share: float = 1.0) -> Sums:
        return Sums(*(own - share * its for own, its in zip(self, other, strict=True)))


class Mixed(NamedTuple):
    """Images as the sums of `method=one-round` have them: of two equal products of numbers, one.

    `weights` of counts, sums and moments: with noise, each is one by its variance.
    """

    rows: Tensor
    labels: Tensor
    weights: Sequence[float] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, examples: Examples, learner: OneRound, deviations: Mapping[str, float] | None = None) -> Mixed:
        """As sums with noise of these deviations, in units, have them: then long features are shortened."""
        basis = learner.basis.cpu()
        rows, labels = coordinates(examples.features.cpu(), basis), examples.labels.cpu()
        if not deviations:
            return cls(rows, labels)
        unit = unit_of(int(learner.bits))
        return cls(shortened(rows, most_of(basis)), labels, [(deviations[name] * unit) ** -2 for name in SUMS])

    def times(self, sums: Sums) -> Tensor:
        """The product of each image's part with these sums."""
        of_counts, of_sums, of_moments = self.weights
        pulled = of_sums * (sums.sums[self.labels] * self.rows).sum(1) + of_counts * sums.counts[self.labels]
        both = ((self.rows @ sums.moments) * self.rows).sum(1) + self.rows.square() @ sums.moments.diagonal()
        return pulled + of_moments * both / 2

    def products(self, other: Mixed) -> Tensor:
        """The products of the images' parts with each other."""
        of_counts, of_sums, of_moments = self.weights
        cosines = self.rows @ other.rows.T
        both = cosines.square() + self.rows.square() @ other.rows.square().T
        same = self.labels[:, None] == other.labels
        return same * (of_counts + of_sums * cosines) + of_moments * both / 2


class Pulls(NamedTuple):
    """Images as one gradient has them: each is the product of two factors, and a count of its class."""

    left: Tensor
    right: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: Examples, learner: OneGradient, scale: float) -> Pulls:
        examples = Examples(*(tensor.cpu() for tensor in examples))
        left, right = (factor / 2**PLACES for factor in factors(examples, learner.prompts.cpu(), scale))
        return cls(left, right, examples.labels)

    def times(self, sums: Mapping[str, Tensor]) -> Tensor:
        """The product of each image's part with these sums, which are in units."""
        gradient, counts = (sums[name].double() * UNIT for name in OneGradient.SENT)
        pulled: Tensor = ((self.left @ gradient) * self.right).sum(1) + COUNT * counts[self.labels]
        return pulled

    def products(self) -> Tensor:
        """The products of the images' parts with each other."""
        same = self.labels[:, None] == self.labels
        return (self.left @ self.left.T) * (self.right @ self.right.T) + COUNT**2 * same


def sums_in(examples: Examples, learner: OneRound) -> Sums:
    """What these images add to the learner's sums."""
    bits = int(learner.bits)
    added: State = sums_of(examples, learner.basis, len(learner.counts), bits)
    return Sums.of(added, bits)


def unmixed(products: Tensor, pulled: Tensor, noise: float = 0.0) -> Tensor:
    """The bᵢ in a sum of bᵢ aᵢ, by least squares: from the products of the aᵢ with each other and with the sum.

    `noise` is the variance of noise in each number of the sum.
    """
    ridge = noise + RIDGE * float(products.diagonal().mean())
    found: Tensor = torch.linalg.solve(products + ridge * torch.eye(len(products), dtype=products.dtype), pulled)
    return found


def unmixed_images(
    learner: ClosedForm,
    sums: Mapping[str, Tensor],
    examples: Examples,
    scale: float,
    deviations: Mapping[str, float] | None = None,
) -> Tensor:
    """How much of each image is in the sums, less a half, if nothing else is in them but noise of these deviations.

    Sums with noise are as they get it: with counts in the same units.
    """
    if isinstance(learner, OneGradient):
        pulls, noise = Pulls.of(examples, learner, scale), deviations["gradient"] * UNIT if deviations else 0.0
        return above_half(pulls.products(), pulls.times(sums), noise**2)
    assert isinstance(learner, OneRound)
    bits, mixed = int(learner.bits), Mixed.of(examples, learner, deviations)
    if deviations:
        sums = {**sums, "counts": sums["counts"] * unit_of(bits)}
    return above_half(mixed.products(mixed), mixed.times(Sums.of(sums, bits)), float(bool(deviations)))


def above_half(products: Tensor, pulled: Tensor, noise: float) -> Tensor:
    """As `unmixed`, but for bits that are 0 or 1 with equal chances; less a half, from which they differ by a half."""
    return unmixed(products, pulled - products.sum(1) / 2, 4 * noise)


def unmixed_pairs(learner: OneRound, known: Examples, first: Examples, second: Examples) -> Tensor:
    """For pairs of images of which one is in the learner's sums: positive for the first one, negative for the second.

    `known` are all other images in the sums. If the sums have more than that, the rest counts as usual images of their
    classes.
    """
    mixed, other = Mixed.of(first, learner), Mixed.of(second, learner)
    both = sums_in(Examples(*(torch.cat(parts) for parts in zip(first, second, strict=True))), learner)
    sums = Sums.of(learner.state_dict(), int(learner.bits)).less(sums_in(known, learner)).less(both, 0.5)
    products = mixed.products(mixed) - mixed.products(other) - other.products(mixed) + other.products(other)
    noise = 0.0
    if rest := float(sums.counts.sum()):
        shares = sums.counts / both.counts.clamp_min(1)
        sums = sums.less(
            Sums(both.counts * shares, both.sums * shares[:, None], both.moments * (rest / len(first.labels) / 2))
        )
        noise = float(products.diagonal().mean())
    return unmixed(products, mixed.times(sums) - other.times(sums), noise)
