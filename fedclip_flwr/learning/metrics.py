"""Metrics of predictions. All follow from counts and sums, so that sites send nothing else.

Definitions are those of scikit-learn: balanced accuracy is the mean recall of the classes that have examples; macro F1
is the mean over the classes that have examples or predictions. The expected calibration error is that of Guo et al.
(arXiv 1706.04599) with 15 bins of equal width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 15


class Score(NamedTuple):
    """Counts and sums of an evaluation; scores of several sites can be added."""

    examples: int
    correct: int
    loss: float  # the sum of cross-entropy over the class prompts

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.examples if self.examples else None


class ClassCounts(NamedTuple):
    """For each class: its examples, how many of them are correct, and how often it was predicted."""

    examples: list[int]
    correct: list[int]
    predicted: list[int]

    @property
    def recalls(self) -> list[float | None]:
        """The recall of each class; None without examples."""
        return [c / n if n else None for n, c in zip(self.examples, self.correct, strict=True)]


@dataclass(frozen=True)
class Quality:
    """All reported metrics of test predictions.

    `gaps` has, for each bin of confidence, the sum of the confidences minus the number of correct predictions.
    `classes` is None where counts by class may not be known.
    """

    score: Score
    balanced_accuracy: float
    macro_f1: float
    gaps: list[float]
    classes: ClassCounts | None = None

    @property
    def accuracy(self) -> float | None:
        return self.score.accuracy

    @property
    def calibration_error(self) -> float:
        return calibration_error(self.gaps, self.score.examples)

    def figures(self) -> dict[str, float]:
        """The metrics by name, as fractions; empty without examples."""
        if self.accuracy is None:
            return {}
        return {
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "calibration_error": self.calibration_error,
        }


def score_of(logits: Tensor, labels: Tensor) -> Score:
    correct = (logits.argmax(dim=1) == labels).sum().item()
    return Score(len(labels), int(correct), F.cross_entropy(logits, labels, reduction="sum").item())


def quality_of(logits: Tensor, labels: Tensor) -> Quality:
    predicted = logits.argmax(dim=1)
    correct = predicted == labels
    many = logits.shape[1]
    counts = ClassCounts(*(torch.bincount(of, minlength=many).tolist() for of in (labels, labels[correct], predicted)))
    confidence = logits.softmax(dim=1).amax(dim=1).double()
    gaps = sums_by_bin(confidence, confidence - correct.double())
    return Quality(score_of(logits, labels), balanced_accuracy(counts), macro_f1(counts), gaps.tolist(), counts)


def no_quality(classes: int) -> Quality:
    """The quality on no image."""
    none = [0] * classes
    return Quality(Score(0, 0, 0.0), 0.0, 0.0, [0.0] * BINS, ClassCounts(none, none, none))


def sums_by_bin(confidence: Tensor, values: Tensor) -> Tensor:
    """The sum of the values in each bin of confidence; as in Guo et al., a bin includes its upper end."""
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    return torch.zeros(BINS, dtype=torch.double, device=confidence.device).index_add_(0, bins, values.double())


def calibration_error(gaps: Iterable[float], examples: int) -> float:
    """The mean distance between confidence and accuracy over the bins, weighted by their examples."""
    return sum(map(abs, gaps)) / max(examples, 1)


def balanced_accuracy(counts: ClassCounts) -> float:
    return mean_of(recall for recall in counts.recalls if recall is not None) or 0.0


def macro_f1(counts: ClassCounts) -> float:
    rows = zip(*counts, strict=True)
    return mean_of(2 * c / (n + p) for n, c, p in rows if n + p) or 0.0


def mean_accuracy(scores: Iterable[Score | Quality]) -> float | None:
    """The mean accuracy over the sites that have examples, with equal weights."""
    return mean_of(score.accuracy for score in scores if score.accuracy is not None)


def mean_figures(qualities: Iterable[Quality]) -> dict[str, float]:
    """The mean of each metric over the sites that have examples."""
    known = [figures for quality in qualities if (figures := quality.figures())]
    return {name: math.fsum(f[name] for f in known) / len(known) for name in (known[0] if known else ())}


def mean_of(values: Iterable[float]) -> float | None:
    known = list(values)
    return math.fsum(known) / len(known) if known else None  # fsum: exact in any order


def gain(later: Mapping[str, Score], before: Mapping[str, Score], most: float = 1.0) -> float | None:
    """How much higher the later accuracy is: the mean over the sites that have examples both times.

    Each site's own gain or loss counts for at most `most`, so that no single site decides.
    """
    return mean_of(
        max(-most, min(most, new - old))
        for site in sorted(later.keys() & before.keys())
        if (new := later[site].accuracy) is not None and (old := before[site].accuracy) is not None
    )


def loss_votes(later: Mapping[str, Score], before: Mapping[str, Score]) -> int:
    """The number of sites whose mean loss is lower later, minus those where it is higher.

    Sites with examples both times have one vote each, whatever losses they claim. Rounding differences do not count.
    """
    votes = 0
    for site in later.keys() & before.keys():
        new, old = later[site], before[site]
        if new.examples and old.examples:
            new_loss, old_loss = new.loss / new.examples, old.loss / old.examples
            if not math.isclose(new_loss, old_loss, rel_tol=1e-6):
                votes += 1 if new_loss < old_loss else -1
    return votes
