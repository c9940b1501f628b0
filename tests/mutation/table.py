"""The mutations that tests have to notice: a piece of a file, what takes its place, and the tests that are run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Mutation(NamedTuple):
    """`old` is in the file once; `why` is the reason if no test can notice the change."""

    file: str
    old: str
    new: str
    tests: Sequence[str]
    why: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())} → {' '.join(self.new.split()) or 'nothing'}"


MUTATIONS: Sequence[Mutation] = (
    Mutation(
        "fedclip_flwr/strategy.py",
        "if report.examples:",
        "if True:",
        ["test_strategy.py", "test_federation.py"],
    ),
)
