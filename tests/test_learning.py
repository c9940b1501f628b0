from __future__ import annotations

import copy
import fractions
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedclip_flwr.adapters import make_adapter
from fedclip_flwr.errors import UserError
from fedclip_flwr.learning import (
    RECIPES,
    Classes,
    Examples,
    Mean,
    best_blend,
    best_round,
    class_loss,
    contrastive_loss,
    evaluate,
    personalize,
    seed_of,
    split,
    train,
)

DIM = 8


def problem(count: int, seed: int = 0) -> tuple[Examples, Classes]:
    generator = torch.Generator().manual_seed(seed)
    examples = Examples(
        torch.randn(count, DIM, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    )
    return examples.ready(), Classes(torch.randn(3, DIM, generator=generator), 20.0).ready()


def test_a_split_is_60_20_20_rounded_down_without_overlap() -> None:
    parts = split(17, seed=4)
    assert [len(p) for p in parts] == [10, 3, 3]
    assert len(set(torch.cat(parts).tolist())) == 16
    assert all(torch.equal(a, b) for a, b in zip(parts, split(17, seed=4), strict=True))
    assert not torch.equal(torch.cat(parts), torch.cat(split(17, seed=5)))
    assert [[len(p) for p in split(count, 0)] for count in (0, 1, 2)] == [[0, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_class_loss_by_hand() -> None:
    classes = Classes(torch.eye(2), scale=2.0)
    loss = class_loss(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([0, 0]), classes)
    first, second = math.log(1 + math.exp(-2)), math.log(1 + math.exp(1.6 - 1.2))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_contrastive_loss_takes_a_second_image_of_a_class_for_a_negative() -> None:
    classes = Classes(torch.eye(2), scale=2.0)
    loss = contrastive_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]), classes)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)  # two equal prompts: no better than a coin
    mixed = contrastive_loss(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([0, 1]), classes)
    rows = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1.2 - 1.6))
    columns = math.log(1 + math.exp(1.2 - 2)) + math.log(1 + math.exp(-1.6))
    assert mixed.item() == pytest.approx((rows + columns) / 4, rel=1e-6)


def test_pixels_stay_as_they_are_and_features_get_unit_length() -> None:
    pixels = Examples(torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2), torch.tensor([0, 1])).ready()
    assert torch.equal(pixels.features, torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2))
    torch.testing.assert_close(
        Examples(torch.tensor([[3.0, 4.0]]), torch.tensor([0])).ready().features[0].norm(), torch.tensor(1.0)
    )


def test_logits_have_the_scale_and_the_bias() -> None:
    logits = Classes(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), scale=10.0, bias=-3.0).logits(torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(logits, torch.tensor([[3.0, 5.0]]))


def plainly_trained(state: dict[str, Tensor], examples: Examples, classes: Classes, recipe: str, seed: int) -> Tensor:
    """Two epochs of the attention adapter with torch.optim.Adam, written out; the outer weight at the end."""
    w = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    paper = recipe == "paper"
    optimizer = torch.optim.Adam(
        w.values(), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2 if paper else 0.0, foreach=False
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        order = torch.randperm(len(examples.labels), generator=generator)
        for start in range(0, len(order), 4):
            rows = order[start : start + 4]
            if paper and len(rows) == 1:
                continue
            x, y = examples.features[rows], examples.labels[rows]
            hidden = torch.tanh(F.linear(x, w["inner.weight"], w["inner.bias"]))
            x = F.normalize(x * F.softmax(F.linear(hidden, w["outer.weight"], w["outer.bias"]), 1), dim=1)
            if paper:
                logits = 20.0 * x @ classes.text[y].T
                target = torch.arange(len(y))
                loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            else:
                loss = F.cross_entropy(20.0 * x @ classes.text.T, y)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return w["outer.weight"].detach()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("count", [13, 14])  # a last batch of one, and of two
def test_training_equals_a_plain_loop_with_torchs_adam(recipe: str, count: int) -> None:
    examples, classes = problem(count)
    adapter = make_adapter("attention", DIM, identity=RECIPES[recipe].identity, seed=1)
    start = copy.deepcopy(adapter.state_dict())
    train(adapter, examples, classes, RECIPES[recipe], learning_rate=1e-2, epochs=2, batch_size=4, seed=9)
    expected = plainly_trained(start, examples, classes, recipe, seed=9)
    torch.testing.assert_close(adapter.state_dict()["outer.weight"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, start["outer.weight"], atol=1e-3)


def test_a_pull_to_the_start_is_the_gradient_of_the_squared_distance() -> None:
    """FedProx, written out: the term in the loss, torch's own Adam."""
    examples, classes = problem(14)
    adapter = make_adapter("scale", DIM)
    with torch.no_grad():
        adapter.get_parameter("log_scale").copy_(torch.linspace(-1, 1, DIM))
    start = adapter.get_parameter("log_scale").detach().clone()
    w = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=1e-2, betas=(0.9, 0.98), eps=1e-6, foreach=False)
    generator = torch.Generator().manual_seed(9)
    for _ in range(3):
        for rows in torch.split(torch.randperm(14, generator=generator), 4):
            x = F.normalize(examples.features[rows] * w.exp(), dim=1)
            loss = (
                F.cross_entropy(20.0 * x @ classes.text.T, examples.labels[rows]) + 7.0 / 2 * (w - start).pow(2).sum()
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    how: dict[str, Any] = {"learning_rate": 1e-2, "epochs": 3, "batch_size": 4, "seed": 9}
    free = copy.deepcopy(adapter)
    train(adapter, examples, classes, RECIPES["default"], proximal=7.0, **how)
    train(free, examples, classes, RECIPES["default"], **how)
    torch.testing.assert_close(adapter.state_dict()["log_scale"], w.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(free.state_dict()["log_scale"], w.detach(), atol=1e-3)


def test_training_is_the_same_to_the_bit_for_a_seed_and_another_for_another() -> None:
    examples, classes = problem(40)

    def trained(seed: int) -> Tensor:
        adapter = make_adapter("attention", DIM)
        train(adapter, examples, classes, RECIPES["default"], learning_rate=1e-2, batch_size=8, seed=seed)
        weight: Tensor = adapter.state_dict()["outer.weight"]
        return weight

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_training_returns_the_mean_loss_of_an_example() -> None:
    examples, classes = problem(10)
    adapter = make_adapter("scale", DIM)
    loss = train(adapter, examples, classes, RECIPES["default"], learning_rate=0.0, batch_size=4)
    assert loss == pytest.approx(class_loss(examples.features, examples.labels, classes).item(), rel=1e-5)
    assert train(adapter, examples.rows(torch.arange(0)), classes, RECIPES["default"], learning_rate=1.0) == 0.0


def test_evaluation_by_hand() -> None:
    classes = Classes(torch.eye(2), scale=1.0)
    examples = Examples(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), torch.tensor([0, 1, 0]))
    score = evaluate(None, examples, classes)
    assert (score.examples, score.correct) == (3, 2)
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.loss == pytest.approx(2 * math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.2)), rel=1e-6)
    assert evaluate(None, examples.rows(torch.arange(0)), classes).accuracy is None


def test_evaluation_looks_through_the_adapter() -> None:
    adapter = make_adapter("scale", 2)
    adapter.load_state_dict({"log_scale": torch.tensor([3.0, 0.0])})
    examples = Examples(torch.tensor([[0.6, 0.8]]), torch.tensor([0]))
    assert evaluate(adapter, examples, Classes(torch.eye(2), 1.0)).correct == 1
    assert evaluate(None, examples, Classes(torch.eye(2), 1.0)).correct == 0


def test_personalising_keeps_the_epoch_that_is_best_by_validation() -> None:
    """By hand: every epoch is trained on its own, and validation is looked at after each."""
    examples, classes = problem(40)
    validation, _ = problem(30, seed=8)
    how: dict[str, Any] = {"learning_rate": 3e-2, "batch_size": 8}
    plain = make_adapter("scale", DIM)
    states, losses = [copy.deepcopy(plain.state_dict())], [evaluate(plain, validation, classes).loss]
    for epoch in range(1, 7):
        train(plain, examples, classes, RECIPES["default"], seed=seed_of(9, "epoch", epoch), **how)
        states.append(copy.deepcopy(plain.state_dict()))
        losses.append(evaluate(plain, validation, classes).loss)
    expected = losses.index(min(losses))
    assert 0 < expected < 6  # else this would not tell it from taking the first or the last
    own = make_adapter("scale", DIM)
    assert personalize(own, examples, validation, classes, RECIPES["default"], epochs=6, seed=9, **how) == expected
    assert torch.equal(own.state_dict()["log_scale"], states[expected]["log_scale"])


def test_personalising_without_validation_or_gain_keeps_the_adapter_as_it_came() -> None:
    examples, classes = problem(40)
    for validation, rate in ((examples.rows(torch.arange(0)), 0.1), (examples, 0.0)):
        own = make_adapter("scale", DIM)
        found = personalize(own, examples, validation, classes, RECIPES["default"], learning_rate=rate, epochs=3)
        assert found == 0
        assert torch.equal(own.state_dict()["log_scale"], torch.zeros(DIM))


def mean(states: Sequence[Tensor], weights: Sequence[float] = (), most: float = 0.0) -> Tensor:
    shares = weights or [1.0] * len(states)
    made = Mean({"a": states[0]}, most or sum(shares))
    for state, weight in zip(states, shares, strict=True):
        made.add({"a": state}, weight)
    return made.value["a"]


def test_means_by_hand() -> None:
    states = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])]
    assert mean(states).tolist() == [2.5, 5.0]
    assert mean(states, [10, 20]).tolist() == [3.0, 6.0]
    assert mean(states, [10, 20], most=1e4).tolist() == [3.0, 6.0]  # most of the sites did not answer
    assert mean(states).dtype == torch.float32


def test_in_a_mean_the_order_changes_no_bit_and_no_precision_is_lost() -> None:
    """In float32, or in float64 one after the other, these sums would differ by their order."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2000, 50, generator=generator) * torch.logspace(-4, 3, 2000)[:, None]
    weights = torch.randint(1, 10_000, (2000,), generator=generator).tolist()
    there, back = mean([*states], weights), mean([*states.flip(0)], weights[::-1])
    assert torch.equal(there, back)
    exact = [[fractions.Fraction(x) for x in row] for row in states.tolist()]
    for column in range(50):
        true = sum(row[column] * w for row, w in zip(exact, weights, strict=True)) / sum(weights)
        assert there[column].item() == pytest.approx(float(true), rel=1e-7)


def test_numbers_that_would_overflow_a_mean_are_refused_and_change_nothing() -> None:
    made = Mean({"a": torch.zeros(2)}, 2)
    made.add({"a": torch.tensor([1.0, Mean.LARGEST - 1])})
    for bad in (Mean.LARGEST, -1e30, float("nan")):
        with pytest.raises(UserError, match="a: numbers of 16,384 and more"):
            made.add({"a": torch.tensor([0.0, bad])})
    assert made.value["a"].tolist() == [1.0, Mean.LARGEST - 1]


def test_sites_that_do_not_answer_change_no_bit_of_a_mean() -> None:
    states = [*torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(mean(states), mean(states, most=8))
    assert torch.equal(mean(states, [300, 5, 41]), mean(states, [300, 5, 41], most=4000))


def test_the_best_round_is_the_earliest_of_the_best() -> None:
    assert best_round([0.5, 0.8, 0.8, 0.7]) == 1


def test_rounds_without_validation_do_not_count_and_without_any_the_last_is_taken() -> None:
    assert best_round([0.5, None, 0.4]) == 0
    assert best_round([None, 0.1, None]) == 1
    assert best_round([None, None, None]) == 2


def test_rounds_before_the_first_that_may_be_chosen_count_only_alone() -> None:
    assert best_round([0.9, 0.5, 0.6], first=1) == 2
    assert best_round([0.9], first=1) == 0


def test_the_best_blend_is_the_smallest_of_the_best() -> None:
    assert best_blend({0.25: 0.5, 0.5: 0.8, 0.75: 0.8, 1.0: 0.7}) == 0.5
    assert best_blend({0.25: None, 1.0: None}) == 1.0


def test_a_wider_attention_takes_smaller_steps_but_the_paper_keeps_its_own() -> None:
    default, paper = RECIPES["default"], RECIPES["paper"]
    assert default.rate("attention", 128, 10) == pytest.approx(4 * default.rate("attention", 512, 10))
    assert default.rate("scale", 128, 10) == default.rate("scale", 512, 10)
    assert paper.rate("attention", 128, 10) == paper.rate("attention", 512, 10) == 5e-5


def test_a_site_with_few_steps_takes_larger_ones_but_not_in_the_paper() -> None:
    default, paper = RECIPES["default"], RECIPES["paper"]
    assert default.rate("gate", 512, 2) == pytest.approx(5 * default.rate("gate", 512, 10))
    assert default.rate("gate", 512, 40) == default.rate("gate", 512, 10) == default.learning_rate["gate"]
    assert default.rate("gate", 512, 0) == default.rate("gate", 512, 1)
    assert paper.rate("gate", 512, 2) == 5e-5
    assert default.rate("full-model", 512, 2) == default.rate("full-model", 512, 10)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_of(0, "train", "art-0", 1) == 44286163806066768
    assert seed_of(0, "train", "art-0", 2) != seed_of(0, "train", "art-01", 2)
