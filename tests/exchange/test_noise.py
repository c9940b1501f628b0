from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.exchange.noise import (
    MOST,
    NEAR,
    apart,
    coins,
    discrete_gaussian,
    epsilon_of,
    lost,
    noised,
    settled,
    share_of,
    sigma_for,
)
from tests.extras import needs

Array = np.ndarray[Any, np.dtype[np.float64]]
SURE = 1e-9
"""How often a test of what is drawn may fail by chance, were it not seeded."""
UNIT = 2**32


def law(sigma: int, width: int) -> Array:
    """The probabilities of -width to width."""
    numbers = np.arange(-width, width + 1)
    found = np.exp(-(numbers**2) / (2 * sigma**2))
    return np.asarray(found / found.sum(), np.float64)


@pytest.mark.parametrize("sigma", [1, 2, 5, 30])
def test_the_numbers_follow_the_law(sigma: int) -> None:
    count, width = 200_000, 12 * sigma
    drawn = discrete_gaussian(count, sigma, random.Random(sigma).randbytes)
    assert len(drawn) == count
    expected = count * law(sigma, width)
    seen = np.bincount(drawn + width, minlength=2 * width + 1)
    usual = expected > 10
    expected, seen = np.append(expected[usual], expected[~usual].sum()), np.append(seen[usual], seen[~usual].sum())
    squares = ((seen - expected) ** 2 / expected).sum()
    assert chi2.sf(squares, len(expected) - 1) > SURE


@pytest.mark.parametrize("sigma", [2**32, 16_022_941_561, MOST])
def test_large_ones_are_normal_to_what_can_be_measured(sigma: int) -> None:
    count = 200_000
    drawn = discrete_gaussian(count, sigma, random.Random(sigma).randbytes)
    places = norm.cdf(drawn / sigma)
    seen, _ = np.histogram(places, bins=50, range=(0, 1))
    assert chi2.sf(((seen - count / 50) ** 2 / (count / 50)).sum(), 49) > SURE
    for bit in range(4):  # the lowest bits are fair
        ones = int(((drawn >> bit) & 1).sum())
        assert abs(ones - count / 2) < norm.isf(SURE) * math.sqrt(count) / 2


def test_without_a_source_it_is_the_operating_systems_entropy() -> None:
    assert not np.array_equal(discrete_gaussian(50, UNIT), discrete_gaussian(50, UNIT))
    assert len(discrete_gaussian(0, UNIT)) == 0
    with pytest.raises(ValueError, match="expected 1 to"):
        discrete_gaussian(1, MOST + 1)


@pytest.mark.parametrize("exponent", [Fraction(0), Fraction(1), Fraction(1, 3), Fraction(40, 7)])
def test_coins_fall_with_their_probability(exponent: Fraction) -> None:
    count = 100_000
    fallen = coins(np.full(count, float(exponent)), lambda at: exponent, random.Random(7).randbytes).sum()
    probability = math.exp(-exponent)
    deviation = math.sqrt(count * probability * (1 - probability))
    assert abs(fallen - count * probability) <= norm.isf(SURE) * deviation


def of(*words: int) -> Callable[[int], bytes]:
    """A source of these 64-bit words."""
    left = iter(words)
    return lambda count: next(left).to_bytes(count, "big")


def test_what_a_float_can_not_tell_is_settled_with_more_bits() -> None:
    """exp(-1/2) = 0.6065306597126334236037995349911804534419181354871869…, its first 117 bits from a table."""
    bits = int(Fraction("0.6065306597126334236037995349911804534419181354871869556828921587350565194137") * 2**117)
    drawn, rest = bits >> 64, bits & (2**64 - 1)
    half = Fraction(1, 2)
    assert settled(drawn - 1, half, of())
    assert not settled(drawn + 1, half, of())
    assert settled(drawn, half, of(rest - 1))
    assert not settled(drawn, half, of(rest + 1))
    assert settled(drawn, half, of(rest, 0))
    assert not settled(drawn, half, of(rest, 2**64 - 1))


def test_a_coin_near_its_probability_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, Fraction]] = []
    monkeypatch.setattr("fedclip_flwr.exchange.noise.settled", lambda *given: not asked.append(given[:2]))  # type: ignore[func-returns-value]
    near = int(math.exp(-0.5) * 2**53)
    far = near + 2 * int(NEAR * 2**53)
    words = np.array([near << 11, far << 11, 0], np.uint64).tobytes()
    fallen = coins(np.full(3, 0.5), lambda at: Fraction(at + 1, 2), lambda count: words)
    assert asked == [(near, half := Fraction(1, 2))]
    assert half
    assert fallen.tolist() == [True, False, True]


def test_noise_is_added_in_whole_numbers_to_what_is_named() -> None:
    sums = {"a": torch.full((300, 200), 5), "b": torch.arange(6).view(2, 3), "c": torch.ones(3)}
    found = noised(sums, {"a": 1000, "b": 3}, random.Random(1).randbytes)
    assert found["a"].dtype == found["b"].dtype == torch.int64
    assert found["c"] is sums["c"]
    assert found["a"].shape == (300, 200)
    assert float((found["a"] - 5).double().std()) == pytest.approx(1000, rel=0.02)
    assert not torch.equal(found["b"], sums["b"])


def delta_of(multiplier: float, epsilon: float) -> float:
    """Balle and Wang 2018, theorem 8, for a sensitivity of 1."""
    half, slope = 1 / (2 * multiplier), epsilon * multiplier
    return float(norm.cdf(half - slope) - math.exp(epsilon) * norm.cdf(-half - slope))


@needs("privacy")
@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-5), (1.0, 1e-5), (3.0, 1e-6), (8.0, 1e-5)])
def test_sigma_keeps_what_it_promises_and_is_hardly_larger(epsilon: float, delta: float) -> None:
    numbers = 25_700
    sigma = sigma_for(epsilon, delta, UNIT, numbers)
    assert delta_of(sigma / UNIT, epsilon) + lost(epsilon, sigma, numbers) <= delta
    assert delta_of(0.9999 * sigma / UNIT, epsilon) > delta
    assert epsilon_of(sigma, delta, UNIT, numbers) == pytest.approx(epsilon, rel=1e-6)
    assert sigma_for(epsilon, delta, 2 * UNIT, numbers) == pytest.approx(2 * sigma, rel=1e-6)
    four_times = epsilon_of(2 * sigma, delta, UNIT, numbers, times=4)
    assert four_times == pytest.approx(epsilon, rel=1e-6)


@needs("privacy")
def test_too_coarse_a_unit_is_refused() -> None:
    with pytest.raises(UserError, match=r"with epsilon = 8 and delta = 1e-05 there is too little noise .* 100,000 of"):
        sigma_for(8.0, 1e-5, 1, 100_000)


@needs("privacy")
def test_the_discrete_law_is_as_private_as_is_said() -> None:
    """One number, sensitivity 20: δ of the two shifted laws, summed in full, beside the formula and what is added."""
    sigma, shift, epsilon = 30, 20, 1.0
    width = 40 * sigma
    one = law(sigma, width)
    other = np.roll(one, shift)
    delta = np.maximum(one - math.exp(epsilon) * other, 0).sum()
    formula = delta_of(sigma / shift, epsilon)
    assert delta <= formula + lost(epsilon, sigma, 1)
    assert delta == pytest.approx(formula, rel=0.01)


@pytest.mark.parametrize("sigma", [1, 2, 3, 10, 40])
def test_the_rounded_law_is_as_near_as_is_said(sigma: int) -> None:
    numbers = np.arange(-40 * sigma, 40 * sigma + 1)
    rounded = norm.cdf((numbers + 0.5) / sigma) - norm.cdf((numbers - 0.5) / sigma)
    assert np.abs(rounded - law(sigma, 40 * sigma)).sum() / 2 <= 1 / (4 * sigma**2)


def test_sums_of_discrete_laws_are_as_near_as_is_said() -> None:
    """Three of σ = 1, convolved, beside σ² = 3: all ratios of probabilities that floats can tell."""
    one = law(1, 30)
    three = np.convolve(np.convolve(one, one), one)
    numbers = np.arange(-90, 91)
    expected = np.exp(-(numbers**2) / 6)
    expected /= expected.sum()
    usual = expected > 1e-12
    assert np.abs(np.log(three[usual] / expected[usual])).max() <= apart(1, 3)
    assert apart(1, 3) < 1e-2
    assert apart(10, 1000) == 0.0
    assert apart(1, 1) == 0.0


@pytest.mark.parametrize(("sigma", "sites", "share"), [(10, 1, 10), (10, 4, 5), (10, 3, 6), (12, 9, 4), (13, 9, 5)])
def test_shares_add_up_to_at_least_the_whole(sigma: int, sites: int, share: int) -> None:
    assert share_of(sigma, sites) == share
    assert sites * share**2 >= sigma**2 > sites * (share - 1) ** 2
