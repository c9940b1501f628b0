from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from fedclip_flwr.base import Settings
from fedclip_flwr.exchange import privacy
from fedclip_flwr.experiments.canaries import findings_of
from fedclip_flwr.learning import Classes, Examples, OneRound, make_adapter, train
from fedclip_flwr.learning.gradient import WHOLE, OneGradient, gradient_of
from fedclip_flwr.learning.membership import (
    MOST,
    SHARES,
    Directions,
    Mixed,
    Pulls,
    Sums,
    above_half,
    auc,
    auc_interval,
    binomial,
    by_gradients,
    chance,
    drops,
    floor,
    floor_of,
    found_at,
    sums_in,
    unmixed,
    unmixed_images,
    unmixed_pairs,
)
from fedclip_flwr.learning.noised_sums import in_units, most_of
from fedclip_flwr.learning.recipes import RECIPES
from fedclip_flwr.learning.sums import BITS, sums_of, unit_of

DELTA = 1e-5


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("odds", [1, 3, 20])
def test_the_chance_of_right_guesses_is_that_of_coins_in_fractions(odds: int) -> None:
    trials, falls = 12, Fraction(odds, odds + 1)
    exact = [math.comb(trials, k) * falls**k * (1 - falls) ** (trials - k) for k in range(trials + 1)]
    assert binomial(trials, odds / (odds + 1)) == pytest.approx([float(part) for part in exact])
    for right in range(trials + 1):
        found = chance(right, trials, 30, math.log(odds), 0.0)
        assert found == pytest.approx(float(sum(exact[right:])))
        steps = [sum(exact[right - fewer : right]) / fewer for fewer in range(1, right + 1)]
        more = float(sum(exact[right:]) + 2 * 30 * Fraction(1, 1000) * max(steps, default=Fraction(0)))
        assert chance(right, trials, 30, math.log(odds), 1e-3) == pytest.approx(min(1.0, more))


def test_floors_by_hand() -> None:
    odds = 0.05 ** (1 / 100) / (1 - 0.05 ** (1 / 100))  # all of a hundred right: qⁿ = 0.05
    assert floor(100, 100, 100, 0.0, 0.05) == pytest.approx(math.log(odds))
    assert floor(100, 100, 100, 0.0, 0.05, steps=2) == pytest.approx(math.log(odds) / 2)
    assert floor(50, 100, 100, 0.0, 0.05) == 0.0
    assert floor(4, 4, 4, 0.0, 0.05) == 0.0  # 1 of 16
    assert 0 < floor(5, 5, 5, 0.0, 0.05) < 0.2  # 1 of 32
    assert floor(100, 100, 100, 1e-3, 0.05) < floor(100, 100, 100, 1e-5, 0.05) < math.log(odds)
    assert floor(100, 100, 100, 0.5, 0.05) == 0.0
    assert floor(10**4, 10**4, 10**4, 0.0, 0.5) < MOST


def test_the_floor_is_that_of_the_best_share_with_all_shares_paid_for() -> None:
    certain = torch.cat([torch.full((50,), 2.0), torch.ones(175), -torch.ones(175)])  # the first eighth is right
    assert floor_of(certain, 0.0, 0.95) == floor(50, 50, 400, 0.0, 0.05 / len(SHARES))
    assert floor_of(certain[50:], 0.0, 0.95) == 0.0
    assert floor_of(torch.zeros(400), 0.0, 0.95) == 0.0  # no guess is no right guess


def test_chance_tells_nothing_as_often_as_promised() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [floor_of(torch.randn(60, generator=generator), DELTA, 0.95) for _ in range(300)]
    assert sum(epsilon > 0 for epsilon in found) <= 300 * 0.05


@pytest.mark.parametrize("multiplier", [0.3, 0.5, 1.0, 2.0, 4.0])
def test_a_gaussian_mechanism_stays_below_the_epsilon_that_it_has(multiplier: float) -> None:
    pytest.importorskip("dp_accounting")
    claimed = privacy.spent(Settings(dp="central", noise_multiplier=multiplier, delta=DELTA), [1])
    assert claimed is not None
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        inside = torch.rand(500, generator=generator) < 0.5
        found = findings_of(inside + multiplier * torch.randn(500, generator=generator).double(), inside, DELTA, 0.95)
        assert found.epsilon <= claimed
        assert multiplier > 1 or found.epsilon > 0.3


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 4.0, 6.0])
def test_the_floor_of_randomized_response_is_seldom_too_high_and_not_far_below(epsilon: float) -> None:
    generator = torch.Generator().manual_seed(2)
    right = torch.rand(200, 1000, generator=generator) < 1 / (1 + math.exp(-epsilon))
    floors = {count: floor(count, 1000, 1000, 0.0, 0.05) for count in set(right.sum(1).tolist())}
    found = [floors[count] for count in right.sum(1).tolist()]
    assert sum(one > epsilon for one in found) <= 200 * 0.05 + 8  # 10 are expected at most, and 18 all but never more
    assert sum(found) / len(found) > 0.7 * epsilon


def test_auc_and_what_is_found_by_hand() -> None:
    assert auc(numbers(3, 2), numbers(1, 2)) == (2 + 1.5) / 4
    assert auc(numbers(1), numbers(2)) == 0.0
    assert found_at(numbers(6.5, 1, 9), numbers(*range(8)), 0.125) == pytest.approx(2 / 3)  # but for 7, all are below
    assert found_at(numbers(6.5, 1, 9), numbers(*range(8)), 0.0) == pytest.approx(1 / 3)


def test_the_interval_holds_the_auc_and_is_wide_at_one() -> None:
    low, high = auc_interval(1.0, 20, 20, 0.95)
    assert low < 0.95
    assert high == 1.0
    low, high = auc_interval(0.5, 100, 100, 0.95)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(12 * 50), rel=0.05)  # that of Mann and Whitney


def test_directions_are_orthonormal() -> None:
    directions = Directions.drawn(50, 7, torch.Generator().manual_seed(0))
    square = torch.stack([directions.along(directions.one(number)) for number in range(7)])
    assert torch.allclose(square, torch.eye(7, dtype=torch.float64), atol=1e-6)


def test_least_squares_gives_back_what_was_mixed() -> None:
    generator = torch.Generator().manual_seed(0)
    parts, bits = torch.randn(5, 20, generator=generator).double(), numbers(1, 0, 1, 1, 0)
    assert torch.allclose(unmixed(parts @ parts.T, parts @ (bits @ parts)), bits, atol=1e-4)


def images(count: int, seed: int, dim: int = 16, classes: int = 4) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return Examples(F.normalize(torch.randn(count, dim, generator=generator), dim=1), labels)


def one_round(statistics: str, examples: Examples) -> OneRound:
    learner = OneRound.new(statistics, images(4, 9, 100).features)
    learner.load_state_dict({**learner.state_dict(), **sums_of(examples, learner.basis, 4)})
    return learner


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_sums_without_noise_give_every_image_back(statistics: str) -> None:
    every, inside = images(60, 0, 100), torch.arange(60) % 3 == 0
    learner = one_round(statistics, every.rows(inside))
    found = unmixed_images(learner, learner.state_dict(), every, 1.0)
    assert torch.allclose(found + 0.5, inside.double(), atol=1e-3)
    assert float(sums_in(every.rows(inside), learner).counts.sum()) == 20


def test_noised_bits_are_those_that_are_nearest_to_the_sum_and_to_a_half() -> None:
    generator = torch.Generator().manual_seed(0)
    parts, bits = torch.randn(5, 20, generator=generator).double(), numbers(1, 0, 1, 1, 0)
    total = bits @ parts + 2 * torch.randn(20, generator=generator).double()
    both = torch.cat([parts.T / 2, 2 * torch.eye(5).double()])  # in deviations: of the noise, 2, and of a bit, ½
    nearest = torch.linalg.lstsq(both, torch.cat([total / 2, numbers(1, 1, 1, 1, 1)])[:, None]).solution[:, 0]
    assert torch.allclose(above_half(parts @ parts.T, parts @ total, 4.0) + 0.5, nearest, atol=1e-5)


def flattened(state: Mapping[str, torch.Tensor], deviations: Mapping[str, float]) -> torch.Tensor:
    """All numbers, in deviations of their noise."""
    return torch.cat([state[name].double().flatten() / deviation for name, deviation in deviations.items()])


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_products_of_images_in_noised_sums_are_those_of_their_numbers(statistics: str) -> None:
    every, learner = images(6, 0, 100), one_round(statistics, images(0, 0, 100))
    deviations = {"counts": 3 / unit_of(BITS), "sums": 0.5 / unit_of(BITS), "moments": 0.1 / unit_of(BITS)}
    mixed = Mixed.of(every, learner, deviations)

    def added(rows: slice) -> dict[str, torch.Tensor]:
        return in_units(sums_of(every.rows(rows), learner.basis, 4, BITS, most_of(learner.basis)), BITS)

    parts = torch.stack([flattened(added(slice(row, row + 1)), deviations) for row in range(6)])
    assert torch.allclose(mixed.products(mixed), parts @ parts.T, atol=1e-8)
    total = added(slice(1, 4))
    plain = {**total, "counts": total["counts"] * unit_of(BITS)}
    assert torch.allclose(mixed.times(Sums.of(plain, BITS)), parts @ flattened(total, deviations), atol=1e-8)
    found = unmixed_images(learner, total, every, 1.0, deviations)
    assert set(found.topk(3).indices.tolist()) == {1, 2, 3}


def test_products_of_images_in_a_gradient_are_those_of_their_numbers() -> None:
    every, learner = images(6, 0), OneGradient.new(images(4, 9).features)

    def added(rows: slice) -> dict[str, torch.Tensor]:
        return gradient_of(every.rows(rows), learner.prompts, 10.0)

    whole = {"gradient": float(WHOLE), "counts": float(WHOLE)}
    parts = torch.stack([flattened(added(slice(row, row + 1)), whole) for row in range(6)])
    pulls, total = Pulls.of(every, learner, 10.0), added(slice(1, 4))
    assert torch.allclose(pulls.products(), parts @ parts.T, atol=1e-8)
    assert torch.allclose(pulls.times(total), parts @ flattened(total, whole), atol=1e-8)
    expected = numbers(0, 1, 1, 1, 0, 0) - 0.5
    assert torch.allclose(unmixed_images(learner, total, every, 10.0), expected, atol=1e-3)
    noisy = unmixed_images(learner, total, every, 10.0, {"gradient": 0.5 * WHOLE, "counts": 0.5 * WHOLE})
    assert torch.allclose(noisy, above_half(parts @ parts.T, parts @ flattened(total, whole), 0.25), atol=1e-5)


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_of_pairs_the_one_in_the_sums_is_found_and_swapping_them_changes_the_sign(statistics: str) -> None:
    first, second, known = images(40, 0, 100), images(40, 1, 100), images(30, 2, 100)
    second = second._replace(labels=first.labels)
    both = Examples(*(torch.cat(parts) for parts in zip(first, known, strict=True)))
    learner = one_round(statistics, both)
    found = unmixed_pairs(learner, known, first, second)
    assert bool((found > 0).all())
    assert torch.allclose(unmixed_pairs(learner, known, second, first), -found)


def test_of_pairs_most_are_found_among_images_that_nobody_knows() -> None:
    first, second, unknown = images(100, 0, 100), images(100, 1, 100), images(200, 2, 100)
    second = second._replace(labels=first.labels)
    learner = one_round("full", Examples(*(torch.cat(parts) for parts in zip(first, unknown, strict=True))))
    found = unmixed_pairs(learner, first.rows(slice(0)), first, second)
    assert float((found > 0).double().mean()) > 0.7


def test_an_adapter_that_memorises_gives_its_images_away() -> None:
    every, inside = images(80, 3), torch.rand(80, generator=torch.Generator().manual_seed(4)) < 0.5
    classes = Classes(images(4, 9).features, 10.0)
    adapter, unseeing = (make_adapter("gate", 16, rank=8) for _ in range(2))
    train(adapter, every.rows(inside), classes, RECIPES["default"], learning_rate=1e-2, epochs=60)
    assert findings_of(drops(adapter, unseeing, every, classes), inside, DELTA, 0.95).epsilon > 0.3
    once = make_adapter("gate", 16, rank=8)
    train(once, every.rows(inside), classes, RECIPES["default"], learning_rate=1e-3)
    assert findings_of(by_gradients(once, unseeing, every, classes), inside, DELTA, 0.95).epsilon > 0.3
