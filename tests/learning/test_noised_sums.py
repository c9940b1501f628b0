from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fedclip_flwr.base.tensors import State
from fedclip_flwr.learning.base import Classes, Examples
from fedclip_flwr.learning.noised_sums import PARTS, Noised, in_units, mended, most_of, sensitivities
from fedclip_flwr.learning.one_round import OneRound, symmetric
from fedclip_flwr.learning.sums import BITS, FINE, sums_of, unit_of

CLASSES, DIM = 5, 80
UNIT = unit_of(BITS)


def start(statistics: str = "span") -> OneRound:
    return OneRound.new(statistics, torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(1)))


def examples(count: int = 2000) -> Examples:
    """Of the last class there are no images."""
    chance = torch.Generator().manual_seed(2)
    labels = torch.randint(CLASSES - 1, (count,), generator=chance)
    features = torch.randn(CLASSES, DIM, generator=chance)[labels] + torch.randn(count, DIM, generator=chance)
    return Examples(5 * features, labels)


def noisy(statistics: str, multiplier: float, count: int = 2000) -> Noised:
    basis = start(statistics).basis
    most = most_of(basis)
    sums = in_units(sums_of(examples(count), basis, CLASSES, BITS, most), BITS)
    deviations = {name: multiplier * one for name, one in sensitivities(BITS, most).items()}
    chance = torch.Generator().manual_seed(3)
    drawn = {
        name: sums[name] + (deviations[name] * torch.randn(sums[name].shape, generator=chance)).round().long()
        for name in PARTS
    }
    return Noised(drawn, count, deviations, BITS, most)


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_an_image_adds_no_more_than_one_in_all_its_parts_together(statistics: str) -> None:
    basis, data = start(statistics).basis, examples(200)
    most = most_of(basis)
    deviations = sensitivities(BITS, most)
    lengths = []
    for row in range(200):
        sums = in_units(sums_of(data.rows(slice(row, row + 1)), basis, CLASSES, BITS, most), BITS)
        lengths.append(sum(float((sums[name].double() / deviations[name]).square().sum()) for name in PARTS))
    assert max(lengths) <= 1
    assert max(lengths) > (0.5 if statistics == "full" else 0.9)  # of products that are there twice, one is sent


@pytest.mark.parametrize("bits", [5, 4])
def test_nor_does_an_image_that_rounding_makes_longer(bits: int) -> None:
    """Of equal numbers, all are rounded the same way."""
    deviations, longest = sensitivities(bits, 1.0), 0.0
    for count in range(64, 513, 8):
        image = Examples((torch.arange(512) < count).float()[None], torch.tensor([0]))
        sums = in_units(sums_of(image, torch.empty(0, 512, dtype=torch.int32), CLASSES, bits, 1.0), bits)
        longest = max(longest, sum(float((sums[name].double() / deviations[name]).square().sum()) for name in PARTS))
    assert bits in FINE
    assert 0.9 < longest <= 1


def test_shortened_features_are_those_of_the_sums() -> None:
    data, basis = examples(1), start().basis
    long = sums_of(data, basis, CLASSES, BITS)["sums"].double() * UNIT
    short = sums_of(data, basis, CLASSES, BITS, 0.01)["sums"].double() * UNIT
    torch.testing.assert_close(short, 0.01 * long / long.norm(), rtol=0, atol=2 * UNIT)


def test_what_is_mended_can_be_solved() -> None:
    found = noisy("span", 1.0)
    assert int(found.sums["counts"].min()) < 0 or int(found.sums["counts"][-1]) != 0
    sums = mended(found)
    counts, means = sums["counts"].double(), sums["sums"].double() * UNIT
    assert counts[-1] == 0
    assert float(counts.min()) >= 0
    assert float(counts.sum()) <= found.images + CLASSES
    within = symmetric(sums["moments"].double() * UNIT) - (means / counts.clamp_min(1)[:, None]).T @ means
    assert float(torch.linalg.eigvalsh(within).min()) > -1e-6
    assert all(tensor.dtype == torch.int64 for tensor in sums.values())


def accuracy(sums: State, data: Examples) -> float:
    made = start()
    classes = Classes(torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(1)), 30.0).ready()
    made.load_state_dict({**made.state_dict(), **sums})
    return float((made.logits(F.normalize(data.features, dim=1), classes).argmax(1) == data.labels).double().mean())


def test_it_learns_from_many_images_and_is_zero_shot_with_too_much_noise() -> None:
    data = examples()
    none = {name: torch.zeros_like(tensor) for name, tensor in mended(noisy("span", 0.6)).items()}
    zero = accuracy(none, data)
    assert accuracy(mended(noisy("span", 0.6)), data) > zero + 0.2
    assert not any(tensor.any() for tensor in mended(noisy("span", 100.0)).values())


def test_noise_makes_images_count_as_fewer() -> None:
    little, more = (mended(noisy("span", multiplier))["counts"].sum() for multiplier in (0.1, 2.0))
    assert int(more) < int(little) <= 2000 + CLASSES


def test_the_blur_by_hand() -> None:
    """A deviation of 3 in each of 64 directions is 24 long; of 500 images a class that is 0.048, of lengths of 0.4."""
    found = Noised({"sums": torch.zeros(4, 64)}, 2000, {"sums": 3 / UNIT}, BITS, 0.4)
    assert found.blur == pytest.approx(3 * math.sqrt(64) / 500 / 0.4)
