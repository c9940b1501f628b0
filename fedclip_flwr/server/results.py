"""The result of a round, the state of a run, and its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange import Report
from fedclip_flwr.learning.metrics import Quality, Score, mean_accuracy, mean_of


@dataclass(frozen=True)
class RoundResult:
    """The adapter after `round` rounds, and the cost of the round that made it.

    `reports` come from the sites that train, `holdouts` from those that only evaluate; `unseen` is the quality on the
    held-out domains that the server itself has. `epsilon` is the privacy spent so far.
    """

    round: int
    reports: Mapping[str, Report]
    unseen: Mapping[str, Quality]
    bytes: int
    seconds: float
    holdouts: Mapping[str, Report] = field(default_factory=dict)
    epsilon: float | None = None

    @property
    def seen(self) -> float | None:
        """Mean test accuracy over the sites that train."""
        return mean_accuracy(report.test for report in self.reports.values())

    @property
    def held_out(self) -> list[Quality]:
        """The quality on everything that no site trains on."""
        return [*self.unseen.values(), *(report.test for report in self.holdouts.values())]

    @property
    def validation(self) -> float | None:
        """Mean validation accuracy over the sites that train."""
        return mean_accuracy(report.validation for report in self.reports.values())

    @property
    def validations(self) -> dict[str, Score]:
        """The validation score of each site that trains."""
        return {site: report.validation for site, report in self.reports.items()}

    @property
    def loss(self) -> float | None:
        """Mean validation loss over the sites that train."""
        scores = [report.validation for report in self.reports.values()]
        return mean_of(score.loss / score.examples for score in scores if score.examples)

    @property
    def facts(self) -> dict[str, Any]:
        """The round as a line of metrics.jsonl."""
        return {
            "round": self.round,
            "seen": self.seen,
            "unseen": mean_accuracy(self.held_out),
            "val": self.validation,
            "loss": self.loss,
            "sites": len(self.reports),
            "bytes": self.bytes,
            "seconds": self.seconds,
            **({} if self.epsilon is None else {"epsilon": self.epsilon}),
        }


@dataclass
class RunState:
    """The state of a run after `round` complete rounds: enough to resume it.

    `zero` is the result of round 0 and `best` that of the selected round so far, whose adapter is `best_state`; both
    are None before the first round is complete. `bytes` and `seconds` are those of the last round; `questions` and
    `question_bytes` count the messages to sites in all rounds, with their answers.
    """

    round: int
    state: State
    best_state: State
    zero: RoundResult | None = None
    best: RoundResult | None = None
    bytes: int = 0
    seconds: float = 0.0
    epsilon: float | None = None
    questions: int = 0
    question_bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """Zero-shot and the selected round, with the reports of all sites that could be asked, and that round's adapter.

    `rounds` is the number of rounds run, `blend` the share of the adapted feature that goes with the adapter, and
    `personal` has the reports of the sites' own adapters, if there are any.
    """

    rounds: int
    zero_shot: RoundResult
    adapted: RoundResult
    blend: float
    personal: Mapping[str, Report]
    state: State
    site_round_bytes: float  # the mean over sites and rounds
    epsilon: float | None
