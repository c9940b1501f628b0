from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedclip_flwr.base.seeds import seed_of
from fedclip_flwr.learning.adapters import Gate, make_adapter
from fedclip_flwr.learning.base import Classes, Examples, Learner
from fedclip_flwr.learning.metrics import Score
from fedclip_flwr.learning.recipes import RECIPES, class_loss, contrastive_loss
from fedclip_flwr.learning.selection import better, chosen
from fedclip_flwr.learning.training import evaluate, logits_of, personalize, split, train

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


def test_pixels_stay_as_they_are_and_features_keep_their_length() -> None:
    pixels = Examples(torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2), torch.tensor([0, 1])).ready()
    assert torch.equal(pixels.features, torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2))
    features = Examples(torch.tensor([[3.0, 4.0]]).half(), torch.tensor([0])).ready().features
    assert torch.equal(features, torch.tensor([[3.0, 4.0]]))


def test_zero_shot_compares_directions() -> None:
    classes = Classes(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), scale=10.0)
    logits = logits_of(None, Examples(torch.tensor([[30.0, 40.0]]), torch.tensor([0])), classes)
    torch.testing.assert_close(logits, torch.tensor([[6.0, 8.0]]))


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
            x = x if paper else F.normalize(x, dim=1)
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
    adapter = make_adapter("attention", DIM, identity=recipe == "default", length=RECIPES[recipe].length, seed=1)
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
            x = F.normalize(F.normalize(examples.features[rows], dim=1) * w.exp(), dim=1)
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
    features = F.normalize(examples.features, dim=1)
    assert loss == pytest.approx(class_loss(features, examples.labels, classes).item(), rel=1e-5)
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
    """By hand: each epoch is trained separately, and validated."""
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
    assert 0 < expected < 6  # not the first or the last, which would prove nothing
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


def scores(*right: int | None) -> dict[str, Score]:
    """Of sites with ten examples each, or none."""
    return {f"site {n}": Score(10 * (r is not None), r or 0, 1.0) for n, r in enumerate(right)}


def test_what_does_as_well_is_not_better_and_what_a_few_sites_say_does_not_decide() -> None:
    default, paper = RECIPES["default"], RECIPES["paper"]
    assert better(scores(6, 7), scores(5, 7), default)
    assert not better(scores(5, 7), scores(5, 7), default)
    assert not better(scores(7, 5), scores(5, 7), default)  # in floating point, the mean of these gains is not 0
    liar = scores(10, 4, 4, 4, 4), scores(0, 5, 5, 5, 5)
    assert not better(*liar, default)
    assert better(*liar, paper)  # as in the released code: the plain mean
    assert not better(scores(10, 10, *[4] * 8), scores(0, 0, *[5] * 8), default)
    assert not better(scores(9, 5), scores(8, 8), default)  # +5 and -5 points, which is nothing, but +10 and -30
    assert better(scores(8, 8), scores(9, 5), default)


def test_zero_shot_must_not_be_better_where_that_can_be_known() -> None:
    """The others lose ten points and one gains five, more than the best so far; or no site can compare."""
    default, paper = RECIPES["default"], RECIPES["paper"]
    zero, best, later = scores(5, 5, 5, 5, 2), scores(3, 3, 3, 3, 9), scores(4, 4, 4, 4, 10)
    assert better(later, best, default)
    assert not chosen(later, best, zero, default)
    assert chosen(later, best, zero, paper)  # zero-shot can't be selected there
    assert chosen(scores(6, 6, 6, 6, 1), best, zero, default)
    assert chosen(scores(None), scores(None), scores(None), default)
    assert chosen({"b": Score(10, 9, 1.0)}, {"b": Score(10, 5, 1.0)}, {"a": Score(10, 5, 1.0)}, default)


def losses(*of_an_example: float) -> dict[str, Score]:
    """Of sites with ten examples each, five of them right."""
    return {f"site {n}": Score(10, 5, 10 * loss) for n, loss in enumerate(of_an_example)}


def test_of_equal_accuracies_the_lower_loss_is_better_but_in_the_paper_the_first_stays() -> None:
    default, paper = RECIPES["default"], RECIPES["paper"]
    assert better(losses(0.8, 0.9), losses(0.9, 1.0), default)
    assert not better(losses(0.8, 0.9), losses(0.9, 1.0), paper)
    for later in (losses(0.9, 1.0), losses(1.0, 1.1), losses(0.8, 1.1)):  # worse at the second site
        assert not better(later, losses(0.9, 1.0), default)
    one, other = Score(10, 5, 9.0), Score(10, 6, 9.0)
    assert better({"a": one._replace(loss=8.0), "b": other}, {"a": other, "b": one}, default)  # the gains cancel out
    assert better({"a": other._replace(loss=90.0)}, {"a": one}, default)  # accuracy comes first


def test_what_a_single_site_claims_of_its_loss_decides_no_tie() -> None:
    default = RECIPES["default"]
    assert better(losses(0.9, 0.9, 0.9, 1e6), losses(1.0, 1.0, 1.0, 1.0), default)
    assert not better(losses(1.1, 1.1, 1.1, 0.0), losses(1.0, 1.0, 1.0, 1e6), default)


def test_zero_shot_stays_where_nothing_is_more_accurate_or_has_a_lower_loss() -> None:
    default, zero = RECIPES["default"], losses(1.0, 1.0, 1.0)
    assert chosen(losses(0.9, 0.9, 1.1), zero, zero, default)
    assert not chosen(losses(0.9, 1.1, 1.1), zero, zero, default)
    best, later = losses(0.9, 0.9, 9.0), losses(0.8, 1.1, 8.0)  # step by step below zero-shot
    assert better(later, best, default)
    assert not chosen(later, best, zero, default)


def test_rounds_that_no_site_can_validate_are_taken_as_they_come() -> None:
    default = RECIPES["default"]
    assert better(scores(None), scores(None), default)
    assert better(scores(3), scores(None), default)
    assert not better(scores(None), scores(3), default)
    assert better(scores(None, 1), {"site 0": Score(10, 9, 1.0)}, default)  # no site evaluated both


def test_a_wider_attention_takes_smaller_steps_but_the_paper_keeps_its_own() -> None:
    default, paper = RECIPES["default"], RECIPES["paper"]
    assert default.rate("attention", 128, 10) == pytest.approx(4 * default.rate("attention", 512, 10))
    assert default.rate("scale", 128, 10) == default.rate("scale", 512, 10)
    assert paper.rate("attention", 128, 10) == paper.rate("attention", 512, 10) == 5e-5


def test_a_site_with_few_steps_takes_larger_ones_but_not_in_the_paper() -> None:
    default, paper = RECIPES["default"], RECIPES["paper"]
    assert default.rate("gate", 512, 2) == pytest.approx(5 * default.rate("gate", 512, 10))
    assert default.rate("gate", 512, 40) == default.rate("gate", 512, 10) == Gate.learning_rate
    assert default.rate("gate", 512, 0) == default.rate("gate", 512, 1)
    assert paper.rate("gate", 512, 2) == 5e-5


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_of(0, "train", "art-0", 1) == 44286163806066768
    assert seed_of(0, "train", "art-0", 2) != seed_of(0, "train", "art-01", 2)


def test_a_state_on_the_cpu_stays_as_it_was_while_learning_continues() -> None:
    adapter = make_adapter("scale", 4)
    state = adapter.on_cpu()
    with torch.no_grad():
        next(adapter.parameters()).add_(1.0)
    assert torch.equal(state["log_scale"], torch.zeros(4))


def test_where_zero_shot_cannot_be_selected_it_may_be_better_than_what_is() -> None:
    zero, best, later = scores(9), scores(3), scores(4)
    assert chosen(later, best, zero, RECIPES["paper"])
    assert not chosen(later, best, zero, RECIPES["default"])


class Dropping(Learner):
    """A learner that draws by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(DIM))

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(F.dropout(features, 0.5) @ self.weight, dim=-1)


def test_a_learner_draws_from_the_seed_and_others_draw_as_if_it_had_not() -> None:
    examples, classes = problem(40)

    def trained(seed: int, rows: int = 32) -> Tensor:
        learner = Dropping()
        train(learner, examples, classes, RECIPES["default"], learning_rate=0.1, batch_size=rows, seed=seed)
        return learner.weight.detach()

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = trained(1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, trained(1))
    assert not torch.equal(trained(1, 40), trained(2, 40))  # all in one batch: their order does not matter
