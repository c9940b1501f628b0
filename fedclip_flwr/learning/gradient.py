"""One gradient: how zero-shot's class embeddings should move, summed over all images; made to be noised.

For an image with the unit feature x, r is the softmax of zero-shot's logits less its class: the gradient of its loss
in the logits. Too long an r is cut, a short one is made longer by as much as one of length `CLIP`. An image contributes

    gradient   (GRADIENT r) xᵀ      and as one more row MEAN xᵀ: the sum of all features
    counts     COUNT, at its class

which together are never longer than 1, whatever the image: that is all that noise has to hide. In whole numbers of
2⁻³² they are at most `WHOLE` long, exactly: factors are rounded towards zero, and begin a little below their length.

Sums are the same to the bit whatever the order, the batches, the sites and their machines: only additions,
multiplications, divisions and square roots of single floats are used, which all machines round alike.

The step differs by direction. Along the mean image it tells how frequent classes are, and is soon too long; across it
can be longer. Noise shortens both: it may move a logit by so much and no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.base.tensors import State
from fedclip_flwr.learning.base import Classes, Examples
from fedclip_flwr.learning.one_round import ClosedForm, Head
from fedclip_flwr.learning.sums import BASIS, ROWS, coordinates, length

SENT = ("gradient", "counts")
"""The tensors that sites send."""
CLIP = 0.5
GRADIENT, MEAN, COUNT = 0.959, 0.2, 0.2
"""How much of an image's length each part has: their squares add up to less than 1."""
PLACES = 16
"""Binary digits of a factor."""
WHOLE = 2 ** (2 * PLACES)
"""The most that an image can add to the length of all sums, in units: their sensitivity."""
UNIT = 1 / WHOLE
BELOW = 1 - 2.0**-30
"""What factors are multiplied by, so that no rounding of floats makes them longer than they may be."""
COUNTED = int(COUNT * BELOW * WHOLE)
"""What an image adds to its class's count."""
FINEST = 40
"""Binary digits of a probability."""
TERMS = 17


class Steps(NamedTuple):
    """By how much logits change for a mean gradient of 1. Chosen by `benchmarks/private_images.py`."""

    across: float = 128.0  # across the mean image, among the classes with images
    along: float = 32.0  # along it
    all: float = 0.25  # times all classes, where some may have no images; twice as much across
    noise: float = 0.25  # the deviation that noise may give a logit, at most


class OneGradient(ClosedForm):
    """The gradients of all sites, and the step that follows from them. Without images it is zero-shot.

    Its state is all that it needs elsewhere. `images` is how many there are, `noise` the deviation of the noise in each
    number, in units: both are public.
    """

    SENT, NEEDED = SENT, "prompts"
    prompts: Tensor
    steps: Tensor
    gradient: Tensor
    images: Tensor
    noise: Tensor

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        tensors = {
            "prompts": torch.zeros(classes, dim, dtype=torch.int32),
            "steps": torch.tensor(Steps(), dtype=torch.float64),
            "gradient": torch.zeros(classes + 1, dim, dtype=torch.int64),
            "counts": torch.zeros(classes, dtype=torch.int64),
            "images": torch.tensor(0),
            "noise": torch.tensor(0.0, dtype=torch.float64),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @classmethod
    def new(cls, text: Tensor) -> Self:
        """The start for the classes' text features [C, dim]."""
        made = cls(*text.shape)
        made.prompts = prompts_of(text)
        return made

    def head(self, classes: Classes) -> Head:
        """As of any closed form; new classes stay what their prompts are."""
        text = F.normalize(classes.text.detach().cpu().double(), dim=-1)
        numbers = torch.arange(len(text)) if classes.numbers is None else torch.tensor(classes.numbers)
        own, known = numbers.clamp_min(0), numbers >= 0
        found = self._found()
        models = [
            (float(classes.scale) * text - torch.where(known[:, None], moves[own], 0.0), text.new_zeros(len(text)))
            for moves in (found.all, found.among)
        ]
        offsets = text.new_full((len(text),), float(classes.bias))
        return Head(models, known & found.seen[own], offsets).to(classes.text.device)

    def _found(self) -> Moves:
        gradient, images = self.gradient.cpu().double() * UNIT, int(self.images)
        mean, rows = gradient[-1], gradient[:-1] / GRADIENT
        noise, steps = float(self.noise) * UNIT, Steps(*self.steps.tolist())
        classes = len(rows)
        if not images:
            return Moves(torch.zeros_like(rows), torch.zeros_like(rows), torch.zeros(classes, dtype=torch.bool))
        most = steps.noise * images * GRADIENT / noise if noise else math.inf
        of_all = min(steps.all * classes, most)
        seen = with_images(self.counts.cpu().double() * UNIT / COUNT, images, noise / COUNT)
        along, across = (of_all, 2 * of_all) if seen is None else (steps.along, steps.across)
        way = mean / mean.norm().clamp_min(UNIT)
        common = torch.outer(rows @ way, way)
        among = min(along, most) * common + min(across, most) * (rows - common)
        every = torch.ones(classes, dtype=torch.bool)
        return Moves(of_all * rows / images, among / images, every if seen is None else seen)


class Moves(NamedTuple):
    """By how much the logits' weights change: among all classes, and among those with images, which are `seen`."""

    all: Tensor
    among: Tensor
    seen: Tensor


def with_images(counts: Tensor, images: int, noise: float) -> Tensor | None:
    """Which classes have images, by noised counts; None if noise of this deviation does not let it be told."""
    usual = images / len(counts)
    seen = counts > min(usual / 2, 4 * noise)
    return seen if usual >= 3 * noise and int(seen.sum()) > 1 else None


def prompts_of(text: Tensor) -> Tensor:
    """The classes' unit text features in units of 2⁻²⁶: what sites compute zero-shot's logits with."""
    rows = coordinates(text.cpu(), torch.empty(0, text.shape[1]))
    return (rows * 2.0**BASIS).round().int()


def gradient_of(examples: Examples, prompts: Tensor, scale: float) -> State:
    """The sums over the examples, in int64 on the CPU: each image's part is at most `WHOLE` long."""
    device, classes = examples.features.device, len(prompts)
    prompts = prompts.to(device)
    gradient = torch.zeros(classes + 1, prompts.shape[1], dtype=torch.int64, device=device)
    for rows in torch.split(torch.arange(len(examples.labels), device=device), ROWS):
        batch = examples.rows(rows)
        left, right = factors(batch, prompts, scale)
        gradient += (left.T @ right).long()
    counts = torch.bincount(examples.labels, minlength=classes) * COUNTED
    return {"gradient": gradient.cpu(), "counts": counts.cpu()}


def factors(examples: Examples, prompts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The two whole factors of what each image adds to the gradient."""
    features = torch.nan_to_num(examples.features.double(), nan=0.0, posinf=0.0, neginf=0.0)
    left = torch.cat([GRADIENT * pulls(features, examples.labels, prompts, scale), left_of_mean(features)], dim=1)
    return whole(left), whole(coordinates(features, prompts[:0]))


def left_of_mean(features: Tensor) -> Tensor:
    return torch.full_like(features[:, :1], MEAN)


def whole(factors: Tensor) -> Tensor:
    """The factors in units of 2⁻¹⁶, rounded towards zero: no row becomes longer."""
    return (factors * (BELOW * 2.0**PLACES)).trunc()


def pulls(features: Tensor, labels: Tensor, prompts: Tensor, scale: float) -> Tensor:
    """Each image's gradient in zero-shot's logits, in lengths of `CLIP` and at most 1 long, whatever the prompts."""
    found = softmax(coordinates(features, prompts) * scale)
    found[torch.arange(len(labels), device=labels.device), labels] -= 1
    return torch.nan_to_num(found / length(found).clamp_min(CLIP)[:, None], nan=0.0, posinf=0.0, neginf=0.0)


def softmax(logits: Tensor) -> Tensor:
    """The same probabilities on every machine, to 2⁻⁴⁰ of the largest."""
    parts = powers((logits - logits.amax(1, keepdim=True)) * math.log2(math.e))
    parts = (parts * 2.0**FINEST).round()
    return parts / parts.long().sum(1, keepdim=True)


def powers(exponents: Tensor) -> Tensor:
    """Two to the power of exponents of at most 0, which count as -60 at least."""
    exponents = exponents.clamp_min(-60.0)
    steps = exponents.ceil()
    rest = (exponents - steps) * math.log(2)
    found = torch.ones_like(rest)
    for term in range(TERMS, 0, -1):
        found = found * rest / term + 1
    return found / torch.bitwise_left_shift(torch.ones_like(steps, dtype=torch.int64), -steps.long())


def noised_by(learner: OneGradient, sums: Mapping[str, Tensor], images: int, noise: float) -> None:
    """Gives the learner the sums of all sites, of so many images, with noise of this deviation in units."""
    added = {"images": torch.tensor(images), "noise": torch.tensor(noise, dtype=torch.float64)}
    learner.load_state_dict({**learner.state_dict(), **sums, **added})
