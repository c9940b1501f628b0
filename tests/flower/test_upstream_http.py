"""As test_upstream.py, for what only the HTTP line has."""

from __future__ import annotations

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity


def test_a_message_can_not_be_made_outside_of_flowers_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskIdentity, "_run_id", None)
    with pytest.raises(RuntimeError, match="TaskIdentity"):
        Message(RecordDict(), 1, MessageType.TRAIN)
