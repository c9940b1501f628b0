"""The gradient, beside another writing of it in numpy, and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.base.tensors import State
from fedclip_flwr.learning.base import Classes, Examples
from fedclip_flwr.learning.gradient import (
    CLIP,
    COUNT,
    GRADIENT,
    MEAN,
    UNIT,
    WHOLE,
    OneGradient,
    gradient_of,
    noised_by,
    powers,
    prompts_of,
    softmax,
    with_images,
)

CLASSES, DIM, SCALE = 6, 40, 20.0


def text() -> Tensor:
    return F.normalize(torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(1)) + 0.5, dim=1)


def examples(count: int = 300) -> Examples:
    """Features of any length around what their classes' prompts say, some of them far away."""
    chance = torch.Generator().manual_seed(2)
    labels = torch.randint(CLASSES - 1, (count,), generator=chance)
    features = text()[labels] + 0.3 * torch.randn(count, DIM, generator=chance) + 0.2
    return Examples(features * torch.rand(count, 1, generator=chance).mul(20), labels)


def learnt(sums: State, images: int, noise: float = 0.0) -> OneGradient:
    made = OneGradient.new(text())
    noised_by(made, sums, images, noise)
    return made


def test_it_is_the_gradient_of_the_loss_with_long_ones_cut_and_short_ones_made_longer() -> None:
    data, classes = examples(), text().double().numpy()
    rows = data.features.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.zeros((CLASSES + 1, DIM))
    for row, label in zip(rows, data.labels.tolist(), strict=True):
        logits = SCALE * classes @ row
        pull = np.exp(logits - logits.max())
        pull /= pull.sum()
        pull[label] -= 1
        pull /= max(np.linalg.norm(pull), CLIP)
        expected += np.outer([*(GRADIENT * pull), MEAN], row)
    found = gradient_of(data, prompts_of(text()), SCALE)
    assert all(tensor.dtype == torch.int64 for tensor in found.values())
    np.testing.assert_allclose(found["gradient"].double() * UNIT, expected, atol=300 * 2.0**-15)
    counts = np.bincount(data.labels, minlength=CLASSES)
    np.testing.assert_allclose(found["counts"].double() * UNIT, COUNT * counts, rtol=1e-8)


def test_no_order_and_no_partition_changes_a_bit() -> None:
    data, prompts = examples(), prompts_of(text())
    whole = gradient_of(data, prompts, SCALE)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    for sizes in ([300], [1] * 300, [7, 0, 250, 43]):
        parts = [gradient_of(data.rows(rows), prompts, SCALE) for rows in torch.split(order, sizes)]
        for name, tensor in whole.items():
            assert torch.equal(sum((part[name] for part in parts), torch.zeros_like(tensor)), tensor)


ODD: dict[str, Any] = {
    "a prompt": text()[0],
    "one axis": torch.eye(DIM)[0],
    "zeros": torch.zeros(DIM),
    "not a number": torch.full((DIM,), math.nan),
    "infinite": torch.eye(DIM)[1] * math.inf,
    "huge": torch.full((DIM,), 3e38),
    "tiny": torch.full((DIM,), 1e-38),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("scale", [0.0, SCALE, 1e4, 1e308, math.inf, math.nan])
def test_no_image_adds_more_than_the_sensitivity(kind: str, scale: float) -> None:
    """Exactly, in Python's whole numbers, whatever a server sends as the scale."""
    for label in range(CLASSES):
        sums = gradient_of(Examples(ODD[kind][None], torch.tensor([label])), prompts_of(text()), scale)
        assert sum(number**2 for tensor in sums.values() for number in tensor.flatten().tolist()) <= WHOLE**2


def test_no_image_of_many_adds_more() -> None:
    data, prompts = examples(), prompts_of(text())
    lengths = []
    for row in range(len(data.labels)):
        sums = gradient_of(data.rows(slice(row, row + 1)), prompts, SCALE)
        lengths.append(sum(number**2 for tensor in sums.values() for number in tensor.flatten().tolist()))
    assert max(lengths) <= WHOLE**2
    assert max(lengths) > 0.999 * WHOLE**2  # nothing of it is given away


def test_probabilities_are_those_of_torch_with_sums_of_exactly_one_in_their_units() -> None:
    exponents = torch.linspace(-59, 0, 5001, dtype=torch.float64)
    torch.testing.assert_close(powers(exponents), torch.exp2(exponents), rtol=1e-15, atol=0)
    assert float(powers(torch.tensor([-1e9], dtype=torch.float64))) == 2.0**-60
    logits = 30 * torch.randn(200, 11, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(softmax(logits), logits.softmax(1), rtol=0, atol=2e-12)


def test_without_images_it_is_zero_shot() -> None:
    classes = Classes(text(), SCALE, -3.0)
    features = examples(20).features
    expected = classes.logits(F.normalize(features, dim=1))
    torch.testing.assert_close(OneGradient.new(text()).logits(features, classes).float(), expected)


def test_two_classes_by_hand() -> None:
    """Two prompts at right angles, one image of the first class halfway: its pull is (-½, ½), 1/√2 long.

    That is longer than `CLIP`, so it becomes (-1, 1)/√2. A single class has images, so it is not told which do: the
    step is 0.25 for each of the two classes, along the mean image, which is the image itself.
    """
    prompts = torch.eye(2)
    classes = Classes(prompts, 10.0)
    image = torch.tensor([[3.0, 3.0]])
    sums = gradient_of(Examples(image, torch.tensor([0])), prompts_of(prompts), 10.0)
    made = OneGradient.new(prompts)
    noised_by(made, sums, 1, 0.0)
    logits = made.logits(image, classes)[0]
    step = 0.25 * 2 / math.sqrt(2)
    assert logits.tolist() == pytest.approx([math.sqrt(50) + step, math.sqrt(50) - step], abs=1e-3)


def test_it_learns_and_new_names_keep_their_prompts() -> None:
    data = examples()
    classes = Classes(text(), SCALE)
    made = learnt(gradient_of(data, prompts_of(text()), SCALE), 300)

    def right(logits: Tensor) -> float:
        return float((logits.argmax(1) == data.labels).double().mean())

    rows = F.normalize(data.features, dim=1)
    assert right(made.logits(data.features, classes)) > right(classes.logits(rows)) + 0.03
    new = F.normalize(torch.randn(2, DIM, generator=torch.Generator().manual_seed(5)), dim=1)
    asked = Classes(torch.cat([text()[[4, 0]], new]), SCALE, numbers=(4, 0, -1, -1))
    found = made.logits(data.features, asked).float()
    torch.testing.assert_close(found[:, 2:], SCALE * rows @ new.T)
    assert not torch.allclose(found[:, :2], SCALE * rows @ text()[[4, 0]].T, atol=0.1)


def test_the_state_is_all_that_it_needs() -> None:
    data, classes = examples(), Classes(text(), SCALE)
    made = learnt(gradient_of(data, prompts_of(text()), SCALE), 300, 5.0 * WHOLE)
    other = OneGradient(CLASSES, DIM)
    other.load_state_dict(made.state_dict())
    assert torch.equal(made.logits(data.features, classes), other.logits(data.features, classes))


def test_noise_moves_no_logit_by_more_than_it_may() -> None:
    """Of nothing but noise, the logits' deviation is `Steps.noise` wherever the steps are not shorter anyway."""
    chance = torch.Generator().manual_seed(6)
    noise = 100.0 * WHOLE
    sums = {"gradient": torch.zeros(CLASSES + 1, DIM), "counts": torch.zeros(CLASSES)}
    drawn = {
        name: (noise * torch.randn(tensor.shape, generator=chance)).round().long() for name, tensor in sums.items()
    }
    features = examples(200).features
    moved = (
        learnt(drawn, 50, noise).logits(features, Classes(text(), SCALE))
        - SCALE * F.normalize(features.double(), dim=1) @ F.normalize(text().double(), dim=1).T
    )
    assert 0.1 < float(moved.std()) < 0.4


def test_which_classes_have_images_is_told_where_noise_lets_it() -> None:
    counts = torch.tensor([100.0, 60.0, 9.0, 0.0])
    assert with_images(counts, 169, 0.0).tolist() == [True, True, True, False]  # type: ignore[union-attr]
    assert with_images(counts, 169, 3.0).tolist() == [True, True, False, False]  # type: ignore[union-attr]
    assert with_images(counts, 169, 30.0) is None
    assert with_images(torch.tensor([169.0, 0.0, 0.0, 0.0]), 169, 0.0) is None
