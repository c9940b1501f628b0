"""What a hello tells a site once, so that later messages need not: they carry its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from fedclip_flwr.base import UserError, content
from fedclip_flwr.data import Vocabulary


class Session(NamedTuple):
    """The domain that no site trains on, the vocabulary, the model's content (empty if not known), the run's name."""

    holdout: str
    vocabulary: Vocabulary
    model: str
    run: str

    @property
    def key(self) -> str:
        return content.digest(json.dumps(self))[:16]

    def remember(self, memory: Path) -> None:
        """So that `recall` finds it by its key."""
        content.remember(f"session-{self.key}", json.dumps(self), memory)

    def forget(self, memory: Path) -> None:
        (memory / f"session-{self.key}").unlink(missing_ok=True)


def recall(key: str, memory: Path) -> Session:
    """The session that was remembered."""
    known = key.isalnum()  # it comes from outside, and names a file
    text = content.recall(f"session-{key}", memory) if known else None
    if text is None:
        raise UserError("this site has forgotten what the run is about: was its FEDCLIP_HOME emptied during the run?")
    holdout, (names, templates), model, run = json.loads(text)
    return Session(holdout, Vocabulary(tuple(names), tuple(templates)), model, run)
