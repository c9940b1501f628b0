"""Exact sums over a site's images: how many of each class, their features, and the products of their features.

A sum is the same to the bit whatever the order of the images, the batches, and the sites that they are at. For that,
each image contributes whole multiples of a unit, 2⁻⁴⁰ by default, and whole numbers are added without rounding:

- A feature is scaled to unit length, and projected, in steps whose result does not depend on the other rows.
- A product is made of the parts of its factors, `bits` binary digits each: one matrix product of floats, exact because
  no partial sum exceeds 2⁵³.

A sum of 62 bits has room for 2²² images (4 million) in all; for more, the unit is 2⁻³² (room for 2³⁰).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedclip_flwr.base.tensors import State
from fedclip_flwr.learning.base import Examples

PARTS = 8
"""A number has its first `PARTS - 1` parts; a product, all pairs of parts that are not smaller than its unit."""
BITS = 5
FINE = (BITS, BITS - 1)
"""The parts that `bits_for` chooses. In coarser units, rounding makes an image count for more than noise hides."""
ROWS = 2**12
"""Rows multiplied at once: at most 2¹³ units of 2⁻⁴⁰ fit into the 53 bits of a float."""
BASIS = 26
"""Binary digits of the numbers of a basis."""
LEAST = 1e-12
"""A feature that is shorter than this stays nearly zero, as in `F.normalize`."""


def unit_of(bits: int) -> float:
    return 2.0 ** -(PARTS * bits)


def bits_for(images: int) -> int:
    """The binary digits in a part, so that the sums over so many images in all fit."""
    return BITS if images <= 2 ** (62 - PARTS * BITS) else BITS - 1


def length(rows: Tensor) -> Tensor:
    """The length of each row; added in halves, so that it doesn't depend on the other rows."""
    squares = rows * rows
    while (width := squares.shape[1]) > 1:
        half = (width + 1) // 2
        left, right = squares[:, :half].clone(), squares[:, half:]
        left[:, : right.shape[1]] += right
        squares = left
    return squares[:, 0].sqrt()


def coordinates(features: Tensor, basis: Tensor) -> Tensor:
    """The unit features in the basis (int32 [r, dim], in units of 2⁻²⁶), or as they are if it is empty; float64."""
    rows = features.double()
    rows = rows / length(rows).clamp_min(LEAST)[:, None]
    if not len(basis):
        return rows
    rows = rows * 2.0**BASIS
    coarse = rows.round()
    fine = ((rows - coarse) * 2.0**18).round()
    turned = basis.double().T
    return (coarse @ turned) * 2.0 ** -(2 * BASIS) + (fine @ turned) * 2.0 ** -(2 * BASIS + 18)


def sums_of(examples: Examples, basis: Tensor, classes: int, bits: int = BITS, most: float = math.inf) -> State:
    """The sums over the examples, in int64 on the CPU; in the basis, a feature longer than `most` is shortened."""
    basis = basis.to(examples.features.device)
    width = len(basis) or examples.features.shape[1]
    device = examples.features.device
    sums = torch.zeros(classes, width, dtype=torch.int64, device=device)
    moments = torch.zeros(width, width, dtype=torch.int64, device=device)
    for rows in torch.split(torch.arange(len(examples.labels), device=device), ROWS):
        batch = examples.rows(rows)
        found = shortened(coordinates(batch.features, basis), most)
        sums.index_add_(0, batch.labels, (found / unit_of(bits)).round().long())
        moments += products(found, bits).long()
    upper = torch.triu_indices(width, width)
    counts = torch.bincount(examples.labels, minlength=classes)
    return {"counts": counts.cpu(), "sums": sums.cpu(), "moments": moments.cpu()[upper[0], upper[1]]}


def shortened(rows: Tensor, most: float) -> Tensor:
    """The rows, the longer ones of this length."""
    return rows * (most / length(rows).clamp_min(most))[:, None] if most < math.inf else rows


def products(rows: Tensor, bits: int) -> Tensor:
    """The sum over the rows of the products of each two of their numbers, in units."""
    parts, wholes, rest, whole = [], [], rows, torch.zeros_like(rows)
    for _ in range(PARTS - 1):
        rest = rest * 2.0**bits
        part = rest.round()
        rest, whole = rest - part, whole * 2.0**bits + part
        parts.append(part)
        wholes.append(whole)
    return torch.cat(parts).T @ torch.cat(wholes[::-1])
