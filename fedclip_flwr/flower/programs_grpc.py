"""The programs that a SuperNode of the gRPC line starts for a message."""

from __future__ import annotations

from flwr.common.constant import ExecPluginType  # a SuperNode's plugins: no setting or hook names the program
from flwr.common.typing import Run  # one is made with a run,
from flwr.proto.task_pb2 import Task  # and starts a program for a task
from flwr.supercore.cli.flower_superexec import _get_plugin_and_stub_class  # the plugin for ClientApps
from flwr.supercore.constant import ExecutorType, TaskType  # in a subprocess, for a ClientApp
from flwr.supercore.superexec.executor import get_executor  # what starts it

TASKS = (TaskType.CLIENT_APP.value,)
"""The kinds of tasks for which it starts a program."""


def start(task: str) -> None:
    """Start the program for a task of that kind, as Flower does."""
    kind, _ = _get_plugin_and_stub_class(ExecPluginType.CLIENT_APP)
    plugin = kind("127.0.0.1:9094", True, None, Run.create_empty, executor=get_executor(ExecutorType.SUBPROCESS))
    plugin.launch_task("token", Task(task_id=1, type=task))
