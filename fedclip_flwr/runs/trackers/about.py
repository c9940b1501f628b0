"""The data that every tracker gets, and the protocol of trackers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Numbers = dict[str, float]


@dataclass(frozen=True)
class About:
    """A new run, or one that is resumed after the rounds `before`. No other run has its `name`."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    before: list[Numbers]


class Tracker(Protocol):
    """Stores the course of a run; made from `About` at its start. `where` tells the user where to look."""

    where: str

    def line(self, line: Numbers) -> None:
        """The figures of a round."""

    def finish(self, figures: Numbers) -> None:
        """The final figures of a completed run."""

    def end(self, status: str) -> None:
        """The last call: the run was completed, failed, or was stopped."""
