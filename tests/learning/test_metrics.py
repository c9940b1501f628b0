from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss
from torch import Tensor

from fedclip_flwr.learning.metrics import (
    BINS,
    Quality,
    Score,
    loss_votes,
    mean_accuracy,
    mean_figures,
    quality_of,
    score_of,
    sums_by_bin,
)


def some(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits and labels; the last class is in no label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes - 1, (count,), generator=generator)
    logits = 2 * torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 1.5
    return logits, labels


@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
@pytest.mark.parametrize(("count", "classes", "seed"), [(1, 3, 0), (7, 12, 1), (300, 4, 2), (2000, 10, 3)])
def test_all_figures_equal_those_of_scikit_learn(count: int, classes: int, seed: int) -> None:
    logits, labels = some(count, classes, seed)
    found, truth = logits.argmax(1).numpy(), labels.numpy()
    quality = quality_of(logits, labels)
    assert quality.accuracy == pytest.approx(accuracy_score(truth, found))
    assert quality.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, found))
    assert quality.macro_f1 == pytest.approx(f1_score(truth, found, average="macro"))
    loss = log_loss(truth, logits.double().softmax(1).numpy(), labels=range(classes))
    assert quality.score.loss / count == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("count", "seed"), [(5, 0), (400, 1), (3000, 2)])
def test_calibration_error_as_its_definition_says(count: int, seed: int) -> None:
    """Over bins (i/15, (i+1)/15]: their share times the distance of mean confidence from accuracy."""
    logits, labels = some(count, 6, seed)
    confidence = logits.softmax(1).max(1).values.double().numpy()
    right = (logits.argmax(1) == labels).numpy()
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert quality_of(logits, labels).calibration_error == pytest.approx(expected, abs=1e-9)


def test_calibration_error_by_hand() -> None:
    logits = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.1, 0.9], [0.5, 0.5]]).log()
    quality = quality_of(logits, torch.tensor([0, 1, 1, 0]))
    # two at 0.75, one right: 0.5 too much; one at 0.9, right: 0.1 too little; one at 0.5, right: 0.5 too little
    assert quality.calibration_error == pytest.approx((0.5 + 0.1 + 0.5) / 4)
    assert len(quality.gaps) == BINS


def test_recall_of_each_class_by_hand() -> None:
    logits = torch.eye(4)[[0, 1, 1, 2, 2, 2]]
    quality = quality_of(logits, torch.tensor([0, 0, 1, 1, 1, 2]))
    assert quality.classes == ([2, 3, 1, 0], [1, 1, 1, 0], [1, 2, 3, 0])
    assert quality.classes is not None
    assert quality.classes.recalls == [1 / 2, 1 / 3, 1, None]
    assert quality.balanced_accuracy == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
    assert quality.macro_f1 == pytest.approx((2 / 3 + 2 / 5 + 2 / 4) / 3)


def test_scores_by_hand() -> None:
    score = score_of(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), torch.tensor([0, 1, 0]))
    assert (score.examples, score.correct) == (3, 2)
    assert score.loss == pytest.approx(2 * math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.2)), rel=1e-6)


def test_without_examples_there_are_no_figures() -> None:
    quality = quality_of(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    assert quality.accuracy is None
    assert quality.figures() == {}
    assert quality.gaps == [0.0] * BINS


def quality(examples: int, correct: int, balanced: float) -> Quality:
    return Quality(Score(examples, correct, 1.0), balanced, 0.5, [0.25 * examples] + [0.0] * (BINS - 1))


def test_means_are_over_sites_with_examples_each_counting_the_same() -> None:
    sites = [quality(4, 1, 0.2), quality(0, 0, 0.0), quality(100, 75, 0.4)]
    assert mean_accuracy(sites) == 0.5
    assert mean_figures(sites) == pytest.approx(
        {"accuracy": 0.5, "balanced_accuracy": 0.3, "macro_f1": 0.5, "calibration_error": 0.25}
    )
    assert mean_accuracy([quality(0, 0, 0.0)]) is None
    assert mean_figures([quality(0, 0, 0.0)]) == {}


def test_each_site_with_examples_both_times_has_one_vote_on_the_loss_of_an_example() -> None:
    before = {"a": Score(10, 5, 2.0), "b": Score(10, 5, 2.0), "c": Score(10, 5, 2.0), "d": Score(0, 0, 0.0)}
    later = {"a": Score(20, 5, 3.0), "b": Score(10, 5, 1e9), "c": Score(10, 5, 0.0), "d": Score(10, 5, 0.0)}
    assert loss_votes(later, before) == 1 - 1 + 1
    assert loss_votes(before, later) == -1
    assert loss_votes({"a": Score(10, 5, 2.0000001)}, before) == 0  # rounding
    assert loss_votes({"e": Score(10, 5, 0.1)}, before) == loss_votes({}, before) == 0


def test_a_bin_includes_its_upper_end() -> None:
    """A fifth and two fifths are three and six bins of fifteen."""
    confidence = torch.tensor([0.0, 0.2, 0.21, 0.4, 1.0], dtype=torch.double)
    assert sums_by_bin(confidence, torch.ones(5)).nonzero()[:, 0].tolist() == [0, 2, 3, 5, 14]
