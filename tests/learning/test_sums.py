from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.base.tensors import State
from fedclip_flwr.learning.base import Examples
from fedclip_flwr.learning.one_round import basis_of, symmetric
from fedclip_flwr.learning.sums import BASIS, BITS, PARTS, bits_for, coordinates, products, sums_of, unit_of

CLASSES, DIM = 12, 96


def examples(count: int = 700, dim: int = DIM) -> Examples:
    """Features of different lengths around a common direction, as CLIP's are."""
    chance = torch.Generator().manual_seed(3)
    features = torch.randn(count, dim, generator=chance) * torch.rand(count, 1, generator=chance).mul(20)
    labels = torch.randint(CLASSES, (count,), generator=chance)
    return Examples(features + 9 * torch.randn(1, dim, generator=chance), labels)


def bases() -> dict[str, Tensor]:
    text = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(4))
    return {"span": basis_of(text, 40), "full": torch.empty(0, DIM, dtype=torch.int32)}


def added(parts: Iterable[Examples], basis: Tensor, bits: int = BITS) -> State:
    total: State = {}
    for part in parts:
        for name, tensor in sums_of(part, basis, CLASSES, bits).items():
            total[name] = total[name] + tensor if name in total else tensor
    return total


def partitions(of: Examples) -> dict[str, list[Tensor]]:
    """The rows of each site."""
    count = len(of.labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    return {
        "in another order": [order],
        "two sites": list(torch.split(order, [count // 3, count - count // 3])),
        "ten sites": list(torch.chunk(order, 10)),
        "one class a site": [(of.labels == number).nonzero()[:, 0] for number in range(CLASSES)],
        "one image a site, and sites without any": [*torch.split(order, 1), order[:0]],
    }


@pytest.mark.parametrize("kind", ["span", "full"])
@pytest.mark.parametrize("bits", [BITS, BITS - 1])
def test_no_partition_and_no_order_changes_a_bit(kind: str, bits: int) -> None:
    data, basis = examples(), bases()[kind]
    together = sums_of(data, basis, CLASSES, bits)
    assert all(tensor.dtype == torch.int64 for tensor in together.values())
    for name, rows in partitions(data).items():
        apart = added((data.rows(own) for own in rows), basis, bits)
        assert all(torch.equal(apart[key], together[key]) for key in together), name


@pytest.mark.parametrize("kind", ["span", "full"])
def test_they_are_the_sums_of_the_unit_features(kind: str) -> None:
    data, basis = examples(), bases()[kind]
    found = sums_of(data, basis, CLASSES)
    rows = data.features.double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if len(basis):
        rows = rows @ (basis.numpy().T / 2.0**BASIS)
    labels = data.labels.numpy()
    sums = np.stack([rows[labels == number].sum(axis=0) for number in range(CLASSES)])
    unit = unit_of(BITS)
    assert found["counts"].tolist() == np.bincount(labels, minlength=CLASSES).tolist()
    np.testing.assert_allclose(found["sums"].numpy() * unit, sums, rtol=0, atol=len(rows) * unit)
    products_of_all = symmetric(found["moments"].double() * unit).numpy()
    np.testing.assert_allclose(products_of_all, rows.T @ rows, rtol=0, atol=2e-10 * len(rows) ** 0.5 * 8)


def test_products_are_those_of_the_parts_and_nothing_is_rounded_in_between() -> None:
    """By hand, in Python's whole numbers."""
    bits, rows = 5, torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 3
    expected = [[0] * 3 for _ in range(3)]
    for row in rows.tolist():
        parts = []
        for value in row:
            own, rest = [], value
            for _ in range(PARTS - 1):
                rest *= 2**bits
                own.append(round(rest))  # to even, as torch does
                rest -= own[-1]
            parts.append(own)
        for one in range(3):
            for other in range(3):
                for i, a in enumerate(parts[one], 1):
                    for j, b in enumerate(parts[other], 1):
                        if i + j <= PARTS:
                            expected[one][other] += a * b << bits * (PARTS - i - j)
    assert products(rows, bits).long().tolist() == expected


def test_a_row_does_not_depend_on_the_others() -> None:
    data = examples(300)
    for basis in bases().values():
        together = coordinates(data.features, basis)
        alone = torch.cat([coordinates(data.features[[row]], basis) for row in range(300)])
        turned = coordinates(data.features.flip(0), basis).flip(0)
        assert torch.equal(together, alone)
        assert torch.equal(together, turned)


def test_features_have_unit_length_and_a_feature_of_zeros_stays() -> None:
    data = examples(20).features
    data[3] = 0
    found = coordinates(data, bases()["full"])
    torch.testing.assert_close(found, F.normalize(data.double(), dim=1), rtol=0, atol=1e-15)
    assert not found[3].any()


@pytest.mark.parametrize(("images", "bits"), [(1, 5), (2**22, 5), (2**22 + 1, 4), (2**30, 4)])
def test_the_whole_federation_fits_into_62_bits(images: int, bits: int) -> None:
    assert bits_for(images) == bits
    assert images / unit_of(bits) <= 2**62
