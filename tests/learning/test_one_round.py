"""The closed form, beside another writing of it in numpy, from the features themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.learning.base import Classes, Examples
from fedclip_flwr.learning.one_round import (
    SUMS,
    WEIGHTS,
    Constants,
    OneRound,
    basis_of,
    personalize,
    symmetric,
    width_of,
)
from fedclip_flwr.learning.sums import BASIS, BITS, sums_of, unit_of
from fedclip_flwr.learning.training import logits_of

Array = np.ndarray[Any, np.dtype[np.float64]]
CLASSES, DIM, SCALE = 20, 96, 30.0
UNSEEN = (3, 11, 17)


def unit(rows: Array) -> Array:
    found: Array = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return found


class Sums(NamedTuple):
    counts: Array
    sums: Array
    moments: Array


def summed(features: Array, labels: Array, basis: Array) -> Sums:
    """Of all features in one place, in float64."""
    rows = unit(features) @ basis.T
    each = [rows[labels == k] for k in range(CLASSES)]
    return Sums(np.array([len(own) for own in each], float), np.stack([own.sum(axis=0) for own in each]), rows.T @ rows)


def written_again(of: Sums, text: Array, asked: Array, new: Array, numbers: Sequence[int], basis: Array) -> Array:
    """The logits of the classes `new` (text features; `numbers` in the run, -1 if none) for the features `asked`."""
    c, (count, sums, moments) = Constants(), of
    q, t, seen, total = unit(asked) @ basis.T, unit(text) @ basis.T, count > 0, count.sum()
    mu = sums / np.maximum(count, 1)[:, None]
    sigma = (moments - (count[:, None] * mu).T @ mu) / (total - seen.sum())
    apart = t - t.mean(axis=0)
    sd = np.sqrt(np.einsum("kd,de,ke->k", apart, moments / total, apart).mean())
    _, s, v = np.linalg.svd(apart, full_matrices=False)
    zero = SCALE * unit(asked) @ unit(new).T
    own = np.array([n >= 0 and bool(seen[n]) for n in numbers])
    both = []
    for share, turn in ((c.share, v[s > 1e-6 * s[0]]), (c.share_among, np.eye(len(moments)))):
        m, b, cov, d = mu @ turn.T, t @ turn.T, turn @ sigma @ turn.T, len(turn)
        cov = (1 - c.shrinkage) * cov + c.shrinkage * np.trace(cov) / d * np.eye(d)
        x0, t0 = m[seen].mean(axis=0), b[seen].mean(axis=0)
        big_a, big_b = m[seen] - x0, b[seen] - t0
        scatter, common = big_b.T @ big_b, (big_a * big_b).sum() / (big_b**2).sum()
        ridge = c.ridge * np.trace(scatter) / d
        slope = np.linalg.solve(scatter + ridge * np.eye(d), big_b.T @ big_a + ridge * common * np.eye(d))

        def line(means: Array, cov: Array = cov) -> tuple[Array, Array]:
            weights: Array = np.linalg.solve(cov, means.T).astype(np.float64)
            offsets: Array = -0.5 * np.einsum("kd,dk->k", means, weights)
            return weights, offsets

        means = (count[:, None] * m + c.images * (x0 + (b - t0) @ slope)) / (count[:, None] + c.images)
        w, o = line(means)
        w, o = w - w.mean(axis=1, keepdims=True), o - o.mean()
        squares = np.einsum("dk,de,ek->k", w, turn @ moments @ turn.T / total, w)
        squares += 2 * o * (sums.sum(axis=0) / total @ turn.T @ w) + o**2
        predicted = x0 + (unit(new) @ basis.T @ turn.T - t0) @ slope
        w, o = line(np.stack([means[n] if own[i] else predicted[i] for i, n in enumerate(numbers)]))
        learnt = SCALE * sd / np.sqrt(squares.mean()) * (q @ turn.T @ w + o)
        both.append(c.sharpness * ((1 - share) * zero + share * learnt))
    low, high = both[0] - c.sharpness * c.margin * SCALE * sd * own, both[1]
    together = np.log(np.exp(low[:, own]).sum(axis=1, keepdims=True))
    low[:, own] = together + high[:, own] - np.log(np.exp(high[:, own]).sum(axis=1, keepdims=True))
    found: Array = low
    return found


def data(dim: int = DIM, classes: int = CLASSES, each: int = 30, *, every: bool = False) -> tuple[Examples, Classes]:
    """Images around prompts that say something of them; of the classes `UNSEEN` there are none, unless `every`."""
    chance = torch.Generator().manual_seed(2)
    text = F.normalize(torch.randn(classes, dim, generator=chance) + 2 * torch.randn(1, dim, generator=chance), dim=1)
    gap = torch.randn(1, dim, generator=chance)
    counts = [0 if k in UNSEEN and not every else 1 + each * (k + 1) // classes for k in range(classes)]
    labels = torch.arange(classes).repeat_interleave(torch.tensor(counts))
    noise = torch.randn(len(labels), dim, generator=torch.Generator().manual_seed(int(every)))
    features = 11 * F.normalize(text[labels] + 0.12 * noise + 0.3 * gap, dim=1)
    return Examples(features, labels), Classes(text, SCALE, -7.0)


def learnt(examples: Examples, classes: Classes, statistics: str = "span", **tensors: Tensor) -> OneRound:
    made = OneRound.new(statistics, classes.text)
    sums = sums_of(examples, made.basis, len(classes.text))
    made.load_state_dict({**made.state_dict(), **sums, **tensors})
    return made


def as_numbers(tensor: Tensor) -> Array:
    found: Array = tensor.double().numpy()
    return found


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_another_writing_has_the_same_logits(statistics: str) -> None:
    """From the same sums to 1e-9; from all features in one place, in float64, to 1e-6."""
    examples, classes = data()
    made = learnt(examples, classes, statistics)
    basis = as_numbers(made.basis) / 2.0**BASIS if len(made.basis) else np.eye(DIM)
    new = torch.randn(4, DIM, generator=torch.Generator().manual_seed(8))
    text, numbers = torch.cat([classes.text, new]), (*range(CLASSES), -1, -1, -1, -1)
    asked = 3 * torch.randn(50, DIM, generator=torch.Generator().manual_seed(9)) + examples.features[:50]
    found = as_numbers(made.logits(asked, Classes(text, SCALE, -7.0, numbers)))
    moments = as_numbers(symmetric(made.moments)) * unit_of(BITS)
    kept = Sums(as_numbers(made.counts), as_numbers(made.sums) * unit_of(BITS), moments)
    pooled = summed(as_numbers(examples.features), as_numbers(examples.labels), basis)
    own, asked_, text_ = map(as_numbers, (classes.text, asked, text))
    for of, most in ((kept, 1e-9), (pooled, 1e-6)):
        wanted = written_again(of, own, asked_, text_, numbers, basis) - 7.0
        assert np.abs(found - wanted).max() < most


def test_without_images_it_is_zero_shot() -> None:
    examples, classes = data()
    made = OneRound.new("span", classes.text)
    torch.testing.assert_close(
        made.logits(examples.features, classes).float(), logits_of(None, examples, classes), rtol=0, atol=1e-4
    )


def test_what_is_learnt_helps_the_classes_with_images_and_those_without() -> None:
    made, (asked, classes) = learnt(*data()), data(every=True)
    new = torch.isin(asked.labels, torch.tensor(UNSEEN))
    before, after = (
        (logits.argmax(dim=1) == asked.labels).double()
        for logits in (logits_of(None, asked, classes), made.logits(asked.features, classes))
    )
    assert after[~new].mean() > before[~new].mean() + 0.05
    assert after[new].mean() > before[new].mean() - 0.05


def test_the_constants_have_no_unit() -> None:
    """They fit a model of any scale, and with a bias for all classes, as SigLIP has it."""
    examples, classes = data()
    low, high = (learnt(examples, classes).head(classes._replace(scale=scale)) for scale in (SCALE, 4 * SCALE))
    for name in ("weights", "bias", "among", "among_bias"):
        torch.testing.assert_close(getattr(high, name), 4 * getattr(low, name), rtol=1e-9, atol=1e-9)
    plain, biased = (learnt(examples, classes).logits(examples.features, classes._replace(bias=b)) for b in (0.0, -7.0))
    torch.testing.assert_close(plain - 7.0, biased, rtol=0, atol=1e-9)


def test_classes_are_known_by_their_numbers() -> None:
    examples, classes = data()
    made, order = learnt(examples, classes), torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))
    found = made.logits(examples.features, classes)
    turned = made.logits(
        examples.features, Classes(classes.text[order], SCALE, -7.0, tuple(int(number) for number in order))
    )
    torch.testing.assert_close(turned, found[:, order], rtol=0, atol=1e-9)
    some = made.logits(examples.features, Classes(classes.text[:3], SCALE, 0.0, (0, 1, -1)))
    assert made.head(Classes(classes.text[:3], SCALE, 0.0, (0, 1, -1))).seen.tolist() == [True, True, False]
    assert some.isfinite().all()


def test_a_sites_prior_is_added_to_its_classes() -> None:
    examples, classes = data()
    prior = torch.linspace(-1, 1, CLASSES, dtype=torch.float64)
    plain, own = learnt(examples, classes), learnt(examples, classes, prior=prior)
    difference = own.logits(examples.features, classes) - plain.logits(examples.features, classes)
    prior[list(UNSEEN)] = 0
    torch.testing.assert_close(difference, prior.expand_as(difference), rtol=0, atol=1e-9)


def skewed(examples: Examples) -> Examples:
    """Those of few classes, and of one most."""
    kept = (examples.labels == 19) | ((examples.labels == 18) & (torch.arange(len(examples.labels)) % 8 == 0))
    return examples.rows(kept)


def test_a_site_adds_its_own_class_frequencies_where_they_help() -> None:
    examples, classes = data()
    made = learnt(examples, classes)
    own, other = skewed(examples), skewed(data(each=60, every=True)[0])
    before = float(F.cross_entropy(made.logits(other.features, classes), other.labels))
    weight = personalize(made, own, other, classes)
    assert weight in WEIGHTS[1:]
    counts = torch.bincount(own.labels, minlength=CLASSES).double()
    torch.testing.assert_close(made.prior, weight * torch.log(1 + counts))
    assert float(F.cross_entropy(made.logits(other.features, classes), other.labels)) < before
    for better in WEIGHTS:
        tried = learnt(examples, classes, prior=better * torch.log(1 + counts))
        loss = float(F.cross_entropy(tried.logits(other.features, classes), other.labels))
        assert loss >= float(F.cross_entropy(made.logits(other.features, classes), other.labels)) - 1e-9


def test_without_a_reason_a_site_adds_nothing() -> None:
    examples, classes = data()
    made = learnt(examples, classes)
    evenly = torch.arange(CLASSES).repeat(3)
    assert personalize(made, Examples(examples.features[:60], evenly), examples.rows(slice(0)), classes) == 0.0
    assert not made.prior.any()
    wrong = Examples(examples.features, (examples.labels + 1) % CLASSES)
    assert personalize(made, skewed(examples), wrong, classes) == 0.0


def odd(name: str) -> tuple[Examples, Classes]:
    examples, classes = data()
    keep: Any = {
        "one image": slice(0, 1),
        "two images of one class": slice(-2, None),
        "one class": examples.labels == 4,
        "one image of each class": torch.tensor([int((examples.labels == k).nonzero()[0]) for k in (0, 1, 2, 4, 5)]),
        "fewer images than dimensions": torch.arange(0, len(examples.labels), 23),
        "the same image twice": torch.tensor([0, 0]),
    }[name]
    return Examples(examples.features[keep], examples.labels[keep]), classes


@pytest.mark.parametrize("statistics", ["span", "full"])
@pytest.mark.parametrize(
    "name",
    [
        "one image",
        "two images of one class",
        "one class",
        "one image of each class",
        "fewer images than dimensions",
        "the same image twice",
    ],
)
def test_small_cases_are_stable(name: str, statistics: str) -> None:
    examples, classes = odd(name)
    made = learnt(examples, classes, statistics)
    everyone = data()[0]
    found = made.logits(everyone.features, classes)
    assert found.isfinite().all()
    zero = logits_of(None, everyone, classes)
    assert float((found.softmax(dim=1) - zero.softmax(dim=1)).abs().max()) < 1
    for one in made._solved() or ():
        assert float(torch.linalg.cond(one.precision)) <= (len(one.rows) + 1) * (
            1 + 1e-6
        )  # what the shrinkage of 0.5 promises


@pytest.mark.parametrize(("classes", "dim"), [(2, 768), (10, 1152), (1000, 768)])
def test_large_cases_are_stable(classes: int, dim: int) -> None:
    examples, known = data(dim, classes, each=3)
    made = learnt(examples, known)
    assert made.sums.shape == (classes, width_of("span", classes, dim))
    assert made.logits(examples.features[:20], known).isfinite().all()


def test_the_basis_begins_with_the_span_of_the_prompts() -> None:
    _, classes = data()
    basis = basis_of(classes.text, 64).double() * 2.0**-BASIS
    torch.testing.assert_close(basis @ basis.T, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-6)
    text = F.normalize(classes.text.double(), dim=1)
    centred = text - text.mean(0)
    torch.testing.assert_close(centred @ basis[:19].T @ basis[:19], centred, rtol=0, atol=1e-6)
    assert torch.equal(basis_of(classes.text, 64), basis_of(classes.text, 64))


def test_the_state_has_the_sums_and_all_else_that_it_needs() -> None:
    examples, classes = data()
    made = learnt(examples, classes)
    assert {*SUMS} < {*made.state_dict()}
    assert made.images == len(examples.labels)
    again = OneRound("span", CLASSES, DIM)
    again.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(again.logits(examples.features, classes), made.logits(examples.features, classes))
    assert int(again.bits) == BITS
