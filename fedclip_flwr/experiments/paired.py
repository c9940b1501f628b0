"""Two methods compared by their results with the same seeds: the mean difference, its 95 % interval, a paired t-test.

Seeds change splits and initial weights, not the images: so this says how certain a difference is for these images,
and nothing about other images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

LEVEL = 0.95


class Difference(NamedTuple):
    """The mean of `pairs` differences. A single one, or equal ones, have no interval and no test."""

    mean: float
    pairs: int
    low: float | None = None
    high: float | None = None
    p: float | None = None

    def text(self) -> str:
        if self.low is None or self.high is None or self.p is None:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}], p {p_text(self.p)}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def difference(values: Sequence[float]) -> Difference:
    """The mean difference of pairs, from their differences; `p` is two-sided."""
    count, middle = len(values), mean(values)
    spread = stdev(values) if count > 1 else 0.0
    if spread < 1e-12:  # rounding
        return Difference(middle, count)
    error = spread / math.sqrt(count)
    half = quantile(LEVEL, count - 1) * error
    return Difference(middle, count, middle - half, middle + half, max(0.0, 1 - within(abs(middle) / error, count - 1)))


def within(t: float, freedom: int) -> float:
    """The probability between -t and t of Student's t-distribution with integer degrees of freedom.

    It uses the finite sums 26.7.3 and 26.7.4 of Abramowitz and Stegun.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def quantile(share: float, freedom: int) -> float:
    """The t with this share of the distribution between -t and t."""
    low, high = 0.0, 1.0
    while within(high, freedom) < share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < share else (low, middle)
    return (low + high) / 2
