"""What a run has found: the result of a round, the state of a run, its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedclip_flwr.base.tensors import State
from fedclip_flwr.exchange.records import Report
from fedclip_flwr.learning.metrics import Quality, Score, mean_accuracy, mean_of


@dataclass(frozen=True)
class Line:
    """The adapter after so many rounds, and what the round that made it took.

    `reports` are of the sites that train, `holdouts` of those that only evaluate; `unseen` is how it does on the
    held-out domains that the server itself has. `epsilon` is what the sites' privacy has been spent for it.
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
        return mean_accuracy(report.test for report in self.reports.values())

    @property
    def held_out(self) -> list[Quality]:
        """All that is known of what nobody trains on."""
        return [*self.unseen.values(), *(report.test for report in self.holdouts.values())]

    @property
    def validation(self) -> float | None:
        return mean_accuracy(report.validation for report in self.reports.values())

    @property
    def validations(self) -> dict[str, Score]:
        return {site: report.validation for site, report in self.reports.items()}

    @property
    def loss(self) -> float | None:
        """Mean validation loss over the sites."""
        scores = [report.validation for report in self.reports.values()]
        return mean_of(score.loss / score.examples for score in scores if score.examples)

    @property
    def facts(self) -> dict[str, Any]:
        """What is told of the round: a line of metrics.jsonl, and of the screen."""
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
class Standing:
    """Where a run stands after so many rounds: the latest adapter, and what is known of those before it.

    `zero` is the line of round 0 and `best` that of the selected round so far, whose adapter is `best_state`; there are
    none before the first round is complete. The last round has taken so many bytes and seconds. All rounds together
    have put so many questions to sites, which took so many bytes, there and back.
    """

    round: int
    state: State
    best_state: State
    zero: Line | None = None
    best: Line | None = None
    bytes: int = 0
    seconds: float = 0.0
    epsilon: float | None = None
    questions: int = 0
    question_bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """Zero-shot and the selected round, with a report of each site that could be asked, and that round's adapter.

    `rounds` is how many there were. `blend` is the share of the adapted feature that belongs to the adapter. `personal`
    has the reports of the sites' own adapters, where there are any.
    """

    rounds: int
    zero_shot: Line
    adapted: Line
    blend: float
    personal: Mapping[str, Report]
    state: State
    site_round_bytes: float  # the mean over sites and rounds
    epsilon: float | None
