"""One round: a closed form from sums over all sites' images (`sums.py`), with the class prompts as a prior.

Two Gaussian models, each with one covariance for all classes (linear discriminant analysis). A class's mean is that of
its images, drawn towards what its prompt predicts: a ridge regression from prompts to means, learnt from the classes
that have images. So a class without any image has a mean, too, and the vocabulary stays open:

- in the span of the class prompts, the model tells all classes apart, those without images included;
- in all directions that sites have measured, it tells the classes with images apart from each other. Of a class without
  images, nothing is known in the other directions: if it were compared there, it would lose to all others.

Each model's logits are mixed with zero-shot's, at the same spread. The probability of a class with images is the
probability of all these classes by the first model, times its share among them by the second.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedclip_flwr.base.tensors import State
from fedclip_flwr.learning.base import Classes, Examples, Learner
from fedclip_flwr.learning.sums import BASIS, BITS, coordinates, unit_of

SUMS = ("counts", "sums", "moments")
"""The tensors that sites send."""
DIRECTIONS = 64
"""Directions that are measured at least with `statistics = "span"`: the prompts' own, filled up with random ones."""
TINY = 1e-12
ALIKE = 1e-6
"""Features whose variance is below this, of a length of 1, count as one: it is far above the rounding of the sums."""


class Constants(NamedTuple):
    """Chosen by validation (docs/results.md), and without a unit, so that one choice fits any model."""

    shrinkage: float = 0.5  # the share of a multiple of the identity in the covariance
    ridge: float = 4.0  # in mean eigenvalues of the prompts' own scatter
    images: float = 1.0  # so many images of a class is the weight of its prompt's prediction
    share: float = 0.65  # of the first model in its logits; zero-shot has the rest
    share_among: float = 0.8  # of the second model
    sharpness: float = 1.5  # all logits are multiplied by it
    margin: float = 0.05  # taken from classes with images, in spreads of zero-shot's logits


def width_of(statistics: str, classes: int, dim: int) -> int:
    """The number of directions that are measured."""
    return dim if statistics == "full" else min(dim, max(classes - 1, DIRECTIONS))


class ClosedForm(Learner, ABC):
    """A model that follows from sums over all images. Without images it is zero-shot.

    `SENT` are the tensors of its state that sites answer with, `NEEDED` the one that they need for that.
    """

    SENT: ClassVar[tuple[str, ...]]
    NEEDED: ClassVar[str]
    counts: Tensor

    @abstractmethod
    def head(self, classes: Classes) -> Head:
        """What predicts these classes; `classes.numbers` says which of the run's own they are."""

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1)

    def logits(self, features: Tensor, classes: Classes) -> Tensor:
        return self.head(classes).forward(features)


class OneRound(ClosedForm):
    """The sums of all sites, and the closed form that follows from them.

    Its state is all that it needs elsewhere. `prior` is a site's own: what it adds to the logits of its classes.
    """

    SENT, NEEDED = SUMS, "basis"

    basis: Tensor
    prompts: Tensor
    constants: Tensor
    bits: Tensor
    sums: Tensor
    moments: Tensor
    prior: Tensor

    def __init__(self, statistics: str, classes: int, dim: int, width: int = 0) -> None:
        """`width`: the number of directions, if more classes have been added since they were chosen."""
        super().__init__()
        width = width or width_of(statistics, classes, dim)
        tensors = {
            "basis": torch.zeros(0 if width == dim else width, dim, dtype=torch.int32),
            "prompts": torch.zeros(classes, width, dtype=torch.float64),
            "constants": torch.tensor(Constants(), dtype=torch.float64),
            "bits": torch.tensor(BITS),
            "counts": torch.zeros(classes, dtype=torch.int64),
            "sums": torch.zeros(classes, width, dtype=torch.int64),
            "moments": torch.zeros(width * (width + 1) // 2, dtype=torch.int64),
            "prior": torch.zeros(classes, dtype=torch.float64),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._fits: tuple[Fit, Fit] | None = None

    @classmethod
    def new(cls, statistics: str, text: Tensor) -> Self:
        """The start for the classes' text features [C, dim]."""
        made = cls(statistics, *text.shape)
        if len(made.basis):
            made.basis = basis_of(text, len(made.basis))
        made.prompts = coordinates(text.cpu(), made.basis)
        return made

    def for_classes(self, text: Tensor) -> OneRound:
        """The same directions, in the same unit, for the classes with these text features; without images."""
        return self.within(self.basis.cpu(), self.bits.cpu(), text)

    @classmethod
    def within(cls, basis: Tensor, bits: Tensor, text: Tensor) -> Self:
        """The start in these directions, with this unit, for the classes' text features."""
        classes, dim = text.shape
        made = cls("", classes, dim, len(basis) or dim)
        made.basis, made.bits = basis, bits
        made.prompts = coordinates(text.cpu(), basis)
        return made

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._fits = None
        return super().load_state_dict(state_dict, strict, assign)

    def choose(self, constants: Constants) -> None:
        """Takes other constants; what of the solution does not depend on them is kept."""
        if Constants(*self.constants.tolist())[:3] != constants[:3]:
            self._fits = None
        self.constants = torch.tensor(constants, dtype=torch.float64)

    def head(self, classes: Classes) -> Head:
        text = F.normalize(classes.text.detach().cpu().double(), dim=-1)
        numbers = torch.arange(len(text)) if classes.numbers is None else torch.tensor(classes.numbers)
        own = numbers.clamp_min(0)
        seen = (numbers >= 0) & (self.counts.cpu()[own] > 0)
        zero_shot = float(classes.scale) * text
        bias, prior = (torch.zeros(len(text), dtype=torch.float64) for _ in range(2))
        if (fits := self._solved()) is None:
            models = [(zero_shot, bias)] * 2
            seen = torch.zeros_like(seen)
        else:
            prompts, chosen = coordinates(text, self.basis.cpu()), Constants(*self.constants.tolist())
            models = []
            for found, part in zip(fits, (chosen.share, chosen.share_among), strict=True):
                weights, offsets = found.linear(prompts, own, seen)
                if len(self.basis):
                    weights = weights @ (self.basis.cpu().double() * 2.0**-BASIS)
                share = part * float(classes.scale) * found.cosines / found.spread
                mixed = (1 - part) * zero_shot + share * weights, bias + share * offsets
                models.append((chosen.sharpness * mixed[0], chosen.sharpness * mixed[1]))
            bias = models[0][1]
            bias[seen] -= chosen.sharpness * chosen.margin * float(classes.scale) * fits[0].cosines
            prior[seen] = self.prior.cpu()[own[seen]]
        return Head(models, seen, prior + float(classes.bias)).to(classes.text.device)

    def neighbours(self) -> list[Neighbour]:
        """Of each class the nearest other one that has images; empty if nothing was learnt."""
        if (fits := self._solved()) is None:
            return []
        means, others = fits[0].means, self.counts.cpu() > 0
        found = []
        for number, mean in enumerate(means):
            apart = means - mean
            squares = ((apart @ fits[0].precision) * apart).sum(1).masked_fill(~others, math.inf)
            squares[number] = math.inf
            nearest = int(squares.argmin())
            found.append(Neighbour(nearest, math.sqrt(float(squares[nearest]))))
        return found

    @property
    def images(self) -> int:
        """The number of images in the sums."""
        return int(self.counts.sum())

    def _solved(self) -> tuple[Fit, Fit] | None:
        """The model in the span of the prompts, and the one in all directions.

        None without anything to learn from: fewer than two classes with images, or images that are all alike.
        """
        if self._fits is None and int((self.counts > 0).sum()) > 1:
            prompts, chosen = self.prompts.cpu(), Constants(*self.constants.tolist())
            centred = prompts - prompts.mean(0)
            _, strengths, rows = torch.linalg.svd(centred, full_matrices=False)
            span = rows[strengths > 1e-6 * strengths[0]]
            means = means_of(self.counts.cpu(), self.sums.cpu(), self.moments.cpu(), unit_of(int(self.bits)))
            cosines = math.sqrt(float(((centred @ means.moments) * centred).sum()) / len(centred))
            if cosines > TINY and (covariance := means.covariance()) is not None:
                whole = torch.eye(prompts.shape[1], dtype=torch.float64)
                self._fits = (
                    fit(means, covariance, prompts, span, cosines, chosen),
                    fit(means, covariance, prompts, whole, cosines, chosen),
                )
        return self._fits


def renumbered(sums: Mapping[str, Tensor], numbers: Sequence[int], classes: int) -> State:
    """The sums with their classes as rows `numbers` of so many; the images of a class without a row must be none."""
    made = dict(sums)
    rows = torch.tensor(numbers)
    for name in ("counts", "sums"):
        made[name] = sums[name].new_zeros(classes, *sums[name].shape[1:])
        made[name][rows[rows >= 0]] = sums[name][rows >= 0]
    return made


class Neighbour(NamedTuple):
    """A class, and how far away its mean is: in standard deviations within classes, in the span of the prompts."""

    number: int
    distance: float


WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
"""The weights of a site's own class frequencies to choose from."""


def personalize(learner: OneRound, examples: Examples, validation: Examples, classes: Classes) -> float:
    """Gives the learner the prior of one site: a weight times log(1 + its training images of the class).

    The weight with the lowest validation loss is kept, the smallest of equal ones, and returned. A class that the site
    has no images of gets 0, as a new one does.
    """
    frequencies = torch.bincount(examples.labels.cpu(), minlength=len(learner.counts)).double().log1p()
    if not len(validation.labels):
        return 0.0
    plain = learner.logits(validation.features, classes)
    losses = [float(F.cross_entropy(plain + (weight * frequencies).to(plain), validation.labels)) for weight in WEIGHTS]
    weight = WEIGHTS[losses.index(min(losses))]
    learner.prior = (weight * frequencies).to(learner.prior.device)
    return weight


class Head(nn.Module):
    """Logits from features: linear ones for all classes, and others for the shares of classes with images."""

    weights: Tensor
    bias: Tensor
    among: Tensor
    among_bias: Tensor
    seen: Tensor
    offsets: Tensor

    def __init__(self, models: Sequence[tuple[Tensor, Tensor]], seen: Tensor, offsets: Tensor) -> None:
        """`models` are the weights and offsets of both; `offsets` are added to the result."""
        super().__init__()
        (weights, bias), (among, among_bias) = models
        parts = {"weights": weights, "bias": bias, "among": among, "among_bias": among_bias}
        for name, tensor in {**parts, "seen": seen, "offsets": offsets}.items():
            self.register_buffer(name, tensor, persistent=False)
        self._any = bool(seen.any())

    def forward(self, features: Tensor) -> Tensor:
        rows = F.normalize(features.to(self.weights.dtype), dim=-1)
        found = rows @ self.weights.T + self.bias
        if self._any:
            shares = (rows @ self.among.T + self.among_bias).masked_fill(~self.seen, -math.inf).log_softmax(dim=1)
            together = found.masked_fill(~self.seen, -math.inf).logsumexp(dim=1, keepdim=True)
            found = torch.where(self.seen, together + shares, found)
        return found + self.offsets


class Means(NamedTuple):
    """What the sums say: images of each class, mean features of each class, and the mean products of all images."""

    counts: Tensor
    classes: Tensor
    moments: Tensor

    @property
    def seen(self) -> Tensor:
        return self.counts > 0

    def covariance(self) -> Tensor | None:
        """The covariance within classes; that of all images if no class has two that differ; None if all are alike."""
        images, classes = float(self.counts.sum()), int(self.seen.sum())
        weighed = self.counts[:, None] * self.classes
        within = self.moments * images - weighed.T @ self.classes
        if images > classes and float(within.trace()) > ALIKE * images:
            return within / (images - classes)
        middle = weighed.sum(0) / images
        over_all = self.moments - torch.outer(middle, middle)
        return over_all if float(over_all.trace()) > ALIKE else None


def means_of(counts: Tensor, sums: Tensor, moments: Tensor, unit: float) -> Means:
    products = symmetric(moments.double() * unit / float(counts.sum()))
    return Means(counts.double(), sums.double() * unit / counts.clamp_min(1)[:, None], products)


def symmetric(upper: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle has these numbers, row by row."""
    width = (math.isqrt(8 * len(upper) + 1) - 1) // 2
    rows, columns = torch.triu_indices(width, width)
    square = upper.new_zeros(width, width)
    square[rows, columns] = upper
    return square + square.triu(1).T


def positive(matrix: Tensor) -> Tensor:
    """The matrix without its negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.as_tensor(vectors * values.clamp_min(0) @ vectors.T)


class Fit(NamedTuple):
    """A Gaussian model in the directions `rows` [k, width] of the measured ones.

    The mean that a prompt t predicts is `centre + (t - text_centre) @ slope`. `cosines` and `spread` say how far an
    image's zero-shot cosines and its logits by this model spread over the run's classes (root mean square).
    """

    rows: Tensor
    centre: Tensor
    text_centre: Tensor
    slope: Tensor
    precision: Tensor
    means: Tensor
    cosines: float
    spread: float

    def linear(self, prompts: Tensor, own: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and offsets of the logits of classes with these prompts; of `seen` ones, `own` are the numbers."""
        means = self.centre + (prompts @ self.rows.T - self.text_centre) @ self.slope
        means = torch.where(seen[:, None], self.means[own], means)
        weights = means @ self.precision
        return weights @ self.rows, -(weights * means).sum(1) / 2


def fit(means: Means, covariance: Tensor, prompts: Tensor, rows: Tensor, cosines: float, chosen: Constants) -> Fit:
    seen, counts = means.seen, means.counts[:, None]
    text, images = prompts @ rows.T, means.classes @ rows.T
    inside, dim = rows @ covariance @ rows.T, len(rows)
    level = inside.trace() / dim
    identity = torch.eye(dim, dtype=torch.float64)
    precision = torch.linalg.inv((1 - chosen.shrinkage) * inside + chosen.shrinkage * level * identity)
    centre, text_centre = images[seen].mean(0), text[seen].mean(0)
    found, given = images[seen] - centre, text[seen] - text_centre
    scatter = given.T @ given
    ridge = chosen.ridge * scatter.trace() / dim
    slope = torch.zeros_like(scatter)
    if scatter.trace() > TINY:
        common = (found * given).sum() / (given * given).sum()
        slope = torch.linalg.solve(scatter + ridge * identity, given.T @ found + ridge * common * identity)
    predicted = centre + (text - text_centre) @ slope
    drawn = (counts * images + chosen.images * predicted) / (counts + chosen.images)
    weights = drawn @ precision
    offsets = -(weights * drawn).sum(1) / 2
    apart, beside = weights - weights.mean(0), offsets - offsets.mean()
    middle = (counts * images).sum(0) / counts.sum()
    products = rows @ means.moments @ rows.T
    squares = ((apart @ products) * apart).sum(1) + 2 * beside * (apart @ middle) + beside * beside
    spread = math.sqrt(max(float(squares.mean()), TINY))
    return Fit(rows, centre, text_centre, slope, precision, drawn, cosines, spread)


def basis_of(text: Tensor, width: int) -> Tensor:
    """Orthonormal directions in units of 2⁻²⁶: the span of the centred prompts first, then random ones."""
    centred = F.normalize(text.cpu().double(), dim=-1)
    centred = centred - centred.mean(0)
    chance = torch.Generator().manual_seed(0)
    more = torch.randn(width, text.shape[1], generator=chance, dtype=torch.float64)
    _, strengths, rows = torch.linalg.svd(centred, full_matrices=False)
    span = rows[strengths > 1e-6 * strengths[0]][:width]
    rows = torch.linalg.qr(torch.cat([span, more]).T)[0].T[:width]
    assert isinstance(rows, Tensor)
    return (rows * 2.0**BASIS).round().int()
