"""The programs that a SuperNode of the HTTP line starts for a message: the server names the kind of its task."""

from __future__ import annotations

from flwr.proto.task_pb2 import Task  # a program is started for a task: no setting or hook names it
from flwr.supercore.constant import ExecutorType, TaskType  # in a subprocess, for each kind
from flwr.supercore.superexec.executor import get_executor  # what starts it
from flwr.supercore.superexec.plugin import AutoExecPlugin  # the plugin for all kinds

TASKS = tuple(task.value for task in TaskType)
"""The kinds of tasks for which it starts a program."""


def start(task: str) -> None:
    """Start the program for a task of that kind, as Flower does."""
    plugin = AutoExecPlugin("127.0.0.1:9094", True, None, executor=get_executor(ExecutorType.SUBPROCESS))
    plugin.launch_task("token", Task(task_id=1, type=task))
