"""Noise for single images: whole numbers of a discrete Gaussian, added to exact sums.

Sums of whole numbers, to which an image adds at most `sensitivity` in length (Euclidean), get noise whose law is
exactly P(k) ∝ exp(-k²/2σ²), σ a whole number (Canonne, Kamath and Steinke, arXiv 2004.00010, algorithm 3 with t = σ,
for many numbers at once):

- All entropy comes from the operating system. A number is built of whole ones: uniform ones, signs, counts of coins.
- A coin falls with probability exp(-E), E a fraction. 53 random bits are compared with a float; where they are closer
  to it than `NEAR`, thousands of times what a float errs by, more bits and as many decimals as are needed settle it.

So no low bits of a float tell what noise was added to, and the law is exact. What is not covered: how long it takes.
`sensitivity` is for an image more or less; for one in place of another it doubles. Where the number of images is told,
read "less" as: the image is there, but adds nothing.

**How private it is.** A Gaussian of real numbers, then rounded, is as private as without rounding: the sums are whole,
so it is the rounding of a private result. Of it the analytic formula is exact (Balle and Wang 2018; dp_accounting). Its
law and the discrete Gaussian's differ by at most 1/(4σ²) in total variation for each number, which is counted in δ
(`lost`). A sum of n discrete Gaussians is, in all ratios of probabilities, within a factor exp(`apart`) for each number
of one with their variance (Kairouz, Liu and Steinke, arXiv 2102.06387): with σ of 10 or more, 1 in all digits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedclip_flwr.base import UserError
from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.privacy import accountant

Source = Callable[[int], bytes]
"""As `os.urandom`: so many random bytes."""
Whole = np.ndarray[Any, np.dtype[np.int64]]
Real = np.ndarray[Any, np.dtype[np.float64]]
Yes = np.ndarray[Any, np.dtype[np.bool_]]
NEAR = 2.0**-40
"""What a float of a probability, and the 53 bits that it is compared with, are closer to the truth than."""
ROUNDED = 1 + 1e-9
"""More than what the search for σ stops short by, as a factor."""
LEAST, MOST = 10, 2**50
"""The smallest and the largest σ, in units."""


def discrete_gaussian(count: int, sigma: int, source: Source = os.urandom) -> Whole:
    """Independent whole numbers with P(k) ∝ exp(-k²/2σ²)."""
    if not 1 <= sigma <= MOST:
        raise ValueError(f"sigma is {sigma}, expected 1 to 2⁵⁰")
    found: list[Whole] = []
    while (lacking := count - sum(len(part) for part in found)) > 0:
        found.append(_proposed(2 * lacking + 100, sigma, source))
    return np.concatenate(found)[:count] if found else np.zeros(0, np.int64)


def _proposed(count: int, sigma: int, source: Source) -> Whole:
    """Those of so many proposals that are accepted: |k| = rest + σ turns, rest uniform, turns geometric."""
    rest, turns = _uniform(count, sigma, source), _turns(count, source)
    minus = (np.frombuffer(source(count), np.uint8) & 1).astype(bool)
    share = rest / sigma
    exponents = ((turns - 1.0) ** 2 + 2 * turns * share + share * share) / 2

    def exact(at: int) -> Fraction:
        part = Fraction(int(rest[at]), sigma)
        return ((int(turns[at]) - 1) ** 2 + 2 * int(turns[at]) * part + part * part) / 2

    sizes = rest + sigma * turns
    accepted = coins(exponents, exact, source) & ~(minus & (sizes == 0))
    return np.asarray(np.where(minus, -sizes, sizes)[accepted], np.int64)


def _uniform(count: int, below: int, source: Source) -> Whole:
    """Whole numbers from 0, below a limit, each equally likely."""
    found: list[Whole] = []
    shift = np.uint64(64 - max(1, (below - 1).bit_length()))
    while (lacking := count - sum(len(part) for part in found)) > 0:
        drawn = (np.frombuffer(source(16 * lacking), np.uint64) >> shift).astype(np.int64)
        found.append(drawn[drawn < below])
    return np.concatenate(found)[:count]


def _turns(count: int, source: Source) -> Whole:
    """How many coins of probability 1/e fall in a row."""
    turns = np.zeros(count, np.int64)
    going = np.arange(count)
    while len(going):
        going = going[coins(np.ones(len(going)), lambda at: Fraction(1), source)]
        turns[going] += 1
    return turns


def coins(exponents: Real, exact: Callable[[int], Fraction], source: Source = os.urandom) -> Yes:
    """Which of the coins fall, whose probabilities are exp(-exponent); `exact` says each exponent as a fraction."""
    drawn = np.frombuffer(source(8 * len(exponents)), np.uint64) >> np.uint64(11)
    above = np.asarray(drawn * 2.0**-53 - np.exp(-exponents), np.float64)
    fallen: Yes = above < 0
    for at in np.flatnonzero(np.abs(above) < NEAR):
        fallen[at] = settled(int(drawn[at]), exact(int(at)), source)
    return fallen


def settled(drawn: int, exponent: Fraction, source: Source = os.urandom) -> bool:
    """Whether a uniform number whose first 53 bits are drawn is below exp(-exponent); more bits are drawn as needed."""
    bits, digits = 53, 40
    while True:
        context = Context(prec=digits)
        power = context.exp(-context.divide(Decimal(exponent.numerator), Decimal(exponent.denominator)))
        # the exponent's last digit is off by at most one, so is the power's
        error = Fraction(power) * max(Fraction(1), exponent) * Fraction(4, 10 ** (digits - 1))
        low, high = Fraction(power) - error, Fraction(power) + error
        if Fraction(drawn + 1, 2**bits) <= low:
            return True
        if Fraction(drawn, 2**bits) >= high:
            return False
        drawn, bits = (drawn << 64) + int.from_bytes(source(8)), bits + 64
        digits += 20


def noised(sums: Mapping[str, Tensor], sigmas: Mapping[str, int], source: Source = os.urandom) -> State:
    """The sums with noise in each number of the named tensors, all in int64."""
    found = {}
    for name, sigma in sigmas.items():
        drawn = torch.from_numpy(discrete_gaussian(sums[name].numel(), sigma, source))
        found[name] = sums[name] + drawn.view(sums[name].shape)
    return {**sums, **found}


def sigma_for(epsilon: float, delta: float, sensitivity: int, numbers: int) -> int:
    """The σ in units, hardly more than the smallest, of which ε and δ hold for so many numbers.

    Raises `UserError` if the discrete law alone would cost all of δ.
    """
    floor = max(LEAST, sensitivity * float(accountant().get_sigma_gaussian(epsilon, delta)))
    left = delta - lost(epsilon, floor, numbers)
    if left <= 0:
        raise UserError(
            f"with epsilon = {epsilon:g} and delta = {delta:g} there is too little noise to be drawn in whole numbers, "
            f"for {numbers:,} of them: set a larger delta or a smaller epsilon"
        )
    return max(LEAST, math.ceil(ROUNDED * sensitivity * float(accountant().get_sigma_gaussian(epsilon, left))))


def epsilon_of(sigma: float, delta: float, sensitivity: int, numbers: int, times: int = 1) -> float:
    """ε at δ of noise of σ units, where as many messages tell of the same images."""
    multiplier = sigma / sensitivity / math.sqrt(times)
    spent = accountant().get_epsilon_gaussian(multiplier, delta)
    for _ in range(3):  # what the discrete law costs of δ depends on ε, and hardly changes it
        spent = accountant().get_epsilon_gaussian(multiplier, delta - times * lost(spent, sigma, numbers))
    return float(spent)


def lost(epsilon: float, sigma: float, numbers: int) -> float:
    """What the discrete law costs of δ, beside the rounded one."""
    return (1 + math.exp(epsilon)) * numbers / (4 * sigma * sigma)


def apart(sigma: float, sites: int) -> float:
    """How far the sum of so many numbers of deviation σ is from a discrete Gaussian: the most of any log ratio."""
    return 10 * sum(math.exp(-2 * (math.pi * sigma) ** 2 * k / (k + 1)) for k in range(1, sites))


def share_of(sigma: int, sites: int) -> int:
    """The σ of one of so many sites, whose noise adds up to at least σ."""
    found = math.isqrt(-(-sigma * sigma // sites))
    return found + (sites * found * found < sigma * sigma)
