"""What every tracker is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Numbers = dict[str, float]


@dataclass(frozen=True)
class About:
    """The run that begins, or goes on after the lines `before`. Its `name` is nobody else's."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    before: list[Numbers]


class Tracker(Protocol):
    """Who is told how the run goes; made of `About` when it begins. `where` tells the user where to look."""

    where: str

    def line(self, line: Numbers) -> None:
        """A round is known."""

    def finish(self, figures: Numbers) -> None:
        """The run was completed, and came to this."""

    def end(self, status: str) -> None:
        """Nothing more comes: the run was completed, failed, or was stopped."""
