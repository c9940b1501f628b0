"""The session: facts of a run that a hello tells a site once. Later messages carry only its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from fedclip_flwr.base import UserError, content
from fedclip_flwr.data import Vocabulary


class Session(NamedTuple):
    """The held-out domain, the vocabulary, the model's content hash (empty if unknown), and the run's name."""

    holdout: str
    vocabulary: Vocabulary
    model: str
    run: str

    @property
    def key(self) -> str:
        return content.digest(json.dumps(self))[:16]

    def remember(self, memory: Path) -> None:
        """Store the session, so that `recall` finds it by its key."""
        content.remember(f"session-{self.key}", json.dumps(self), memory)

    def forget(self, memory: Path) -> None:
        (memory / f"session-{self.key}").unlink(missing_ok=True)


def recall(key: str, memory: Path) -> Session:
    """The stored session of that key."""
    valid = key.isalnum()  # untrusted, and used as a file name
    text = content.recall(f"session-{key}", memory) if valid else None
    if text is None:
        raise UserError("session not found at this site: was its FEDCLIP_HOME emptied during the run?")
    holdout, (names, templates), model, run = json.loads(text)
    return Session(holdout, Vocabulary(tuple(names), tuple(templates)), model, run)
