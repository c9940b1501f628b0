"""As test_upstream.py, for what only the HTTP line has."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.task_identity import TaskIdentity

from fedclip_flwr.flower import lines, pinned


def test_a_message_can_not_be_made_outside_of_flowers_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskIdentity, "_run_id", None)
    with pytest.raises(RuntimeError, match="TaskIdentity"):
        Message(RecordDict(), 1, MessageType.TRAIN)


def test_a_server_chooses_the_program_that_a_supernode_starts() -> None:
    for task in (TaskType.CLIENT_APP, TaskType.AGENT_APP):
        program = pinned._started(task.value, str(Path(sys.executable).parent))
        assert program
        assert Path(program).name == task.value


def test_flower_makes_an_environment_for_each_run_unless_it_is_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = lines.NO_INSTALLATION
    monkeypatch.delenv(name)
    command = import_module("flwr.superlink.cli.flower_superlink")  # a function has this name, too
    assert command._runtime_dependency_install_default()
    monkeypatch.setenv(name, lines.NO_INSTALLATION[name])
    assert not command._runtime_dependency_install_default()
