"""The sums of `sums.py` with noise: what an image adds to each at most, and sums that can be solved again.

An image adds `UNITS` to a count, a feature of at most `most` to its class's sum, and the products of its numbers. Each
tensor has its part of the noise's strength (`PARTS`): its deviation is that of a sensitivity of 1, times what an image
adds to it at most, by its part. So all of them together are as private as one vector of length 1 with that noise.

That takes many images: of fewer than about a hundred of each class, at ε = 8, the gradient (`gradient.py`) is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedclip_flwr.base.tensors import State
from fedclip_flwr.learning.gradient import with_images
from fedclip_flwr.learning.one_round import positive, symmetric
from fedclip_flwr.learning.sums import unit_of

PARTS = {"counts": 0.275, "sums": 0.92, "moments": 0.275}
"""Their squares add up to less than 1."""
SPAN = 0.4
"""The length to which features are shortened in the span of the prompts: of CLIP's, few are longer there."""
SLACK = 1 + 2.0**-20
"""More than what rounding adds to an image's sums, as a factor."""
BLUR = 0.3
"""The most that noise may move the mean of a class with as many images as usual, in lengths of a feature."""
LEAST = 1e-4
"""The smallest variance of a direction within classes that noised sums are trusted with."""


def most_of(basis: Tensor) -> float:
    """The length to which features are shortened in this basis."""
    return SPAN if len(basis) else 1.0


def in_units(sums: Mapping[str, Tensor], bits: int) -> State:
    """The sums with counts in the same units as the others."""
    return {**sums, "counts": sums["counts"] * round(1 / unit_of(bits))}


def sensitivities(bits: int, most: float) -> dict[str, float]:
    """By tensor, the deviation in units of noise that is 1 for a sensitivity of 1."""
    lengths = {"counts": 1.0, "sums": most, "moments": most**2}
    return {name: SLACK * lengths[name] / unit_of(bits) / part for name, part in PARTS.items()}


class Noised(NamedTuple):
    """Noised sums (`in_units`) of so many images, with the deviations in each number, in units."""

    sums: Mapping[str, Tensor]
    images: int
    deviations: Mapping[str, float]
    bits: int
    most: float

    @property
    def blur(self) -> float:
        """The length of the noise in the mean of a class with as many images as usual, in lengths of a feature."""
        classes, width = self.sums["sums"].shape
        return self.deviations["sums"] * unit_of(self.bits) * math.sqrt(width) * classes / self.images / self.most


def mended(found: Noised) -> State:
    """Sums of whole images that can be solved: none of them negative, their scatter positive semidefinite.

    A class without images to speak of has none; those of one with noise in its mean count as fewer. With too
    much noise for the number of images there are none at all, and the model is zero-shot.
    """
    unit, images = unit_of(found.bits), found.images
    counts, sums, moments = (found.sums[name].double() * unit for name in PARTS)
    seen = with_images(counts, images, found.deviations["counts"] * unit)
    if seen is None or found.blur > BLUR:
        return {name: torch.zeros_like(found.sums[name]) for name in PARTS}
    counts = torch.where(seen, counts.clamp_min(1.0), 0.0)
    counts = counts * (images / counts.sum())
    means = torch.where(seen[:, None], sums, 0.0) / counts.clamp_min(1.0)[:, None]
    variance = (found.deviations["sums"] * unit) ** 2
    products = symmetric(moments)
    own = (variance / counts[seen]).sum() * torch.eye(len(products), dtype=torch.float64)
    within = positive(products - (counts[:, None] * means).T @ means + own)
    left = max(images - int(seen.sum()), 1)
    level = max(float(within.trace()) / len(within) / left, LEAST)
    fewer = torch.where(seen, (counts / (1 + variance / (counts.clamp_min(1.0) * level))).round().clamp_min(1.0), 0.0)
    share = max(float(fewer.sum()) - int(seen.sum()), 1.0) / left
    products = within * share + (fewer[:, None] * means).T @ means
    upper = torch.triu_indices(*products.shape)
    made = {"sums": fewer[:, None] * means / unit, "moments": products[upper[0], upper[1]] / unit}
    return {"counts": fewer.long(), **{name: tensor.round().long() for name, tensor in made.items()}}
