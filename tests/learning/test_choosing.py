from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedclip_flwr.learning.base import Examples
from fedclip_flwr.learning.choosing import FOLDS, GRID, MOST_GAIN, best, scores, without
from fedclip_flwr.learning.one_round import Constants, OneRound
from fedclip_flwr.learning.sums import sums_of
from tests.learning.test_one_round import CLASSES, UNSEEN, data, learnt

DEFAULT = GRID.index(Constants())


@pytest.mark.parametrize("statistics", ["span", "full"])
def test_without_a_class_the_sums_are_nearly_those_of_the_others(statistics: str) -> None:
    """Its images' scatter around their mean stays: it can't be told from that of others."""
    examples, classes = data()
    left = torch.tensor([5, 19])
    made = without(learnt(examples, classes, statistics), left)
    kept = examples.rows(~torch.isin(examples.labels, left))
    exact = sums_of(kept, made.basis, CLASSES)
    assert torch.equal(made.counts, exact["counts"])
    assert torch.equal(made.sums, exact["sums"])
    first, second = (torch.diag(_square(one)).sum() for one in (made.moments, exact["moments"]))
    assert 1 < float(first) / float(second) < 1.2


def _square(moments: torch.Tensor) -> torch.Tensor:
    from fedclip_flwr.learning.one_round import symmetric

    return symmetric(moments.double())


def test_the_scores_are_the_losses_with_and_without_each_images_class() -> None:
    """Each by itself, without anything that is kept from one to the next."""
    examples, classes = data()
    made, validation = learnt(examples, classes), data(every=True)[0]
    found = scores(made, validation, classes)
    assert len(found) == 2 * len(GRID)
    seen = [number for number in range(CLASSES) if number not in UNSEEN]
    for number in (0, DEFAULT, len(GRID) - 1):
        constants = torch.tensor(GRID[number], dtype=torch.float64)

        def loss(of: OneRound, rows: torch.Tensor, constants: torch.Tensor = constants) -> float:
            model = OneRound("span", CLASSES, 96)
            model.load_state_dict({**of.state_dict(), "constants": constants})
            own = validation.rows(rows)
            return float(F.cross_entropy(model.logits(own.features, classes), own.labels, reduction="sum"))

        assert found[number] == pytest.approx(loss(made, torch.arange(len(validation.labels))), rel=1e-9)
        apart = 0.0
        for first in range(FOLDS):
            fold = torch.tensor(seen[first::FOLDS])
            apart += loss(without(made, fold), torch.isin(validation.labels, fold).nonzero()[:, 0])
        assert found[len(GRID) + number] == pytest.approx(apart, rel=1e-9)


def test_a_site_without_validation_images_scores_nothing() -> None:
    examples, classes = data()
    assert not any(scores(learnt(examples, classes), examples.rows(slice(0)), classes))
    few = Examples(examples.features[:1], examples.labels[:1])
    assert len(scores(learnt(few, classes), examples, classes)) == 2 * len(GRID)


def losses(**of: float) -> list[float]:
    """The same for all, but for those named by their number."""
    found = [1.0] * (2 * len(GRID))
    for name, value in of.items():
        found[int(name.removeprefix("n"))] = value
    return found


def test_the_lowest_loss_is_chosen_and_no_site_decides_alone() -> None:
    assert best([]) == Constants()
    assert best([(4, losses())]) == Constants()
    assert best([(0, losses(n3=0.0))]) == Constants()
    assert best([(1, losses(n3=0.95))]) == GRID[3]
    assert best([(1, losses(n3=0.95)), (1, losses(n3=1.2, n5=0.97))]) == GRID[5]
    assert best([(1, losses(n3=-1e6)), *[(1, losses(n3=1 + MOST_GAIN, n5=0.9))] * 2]) == GRID[5]
    assert best([(1, [1.0, 2.0])]) == Constants()
