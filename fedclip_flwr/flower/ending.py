"""Ends a process of Flower's that can no longer do its work, where systemd or Docker start it again."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import time
from typing import Any

from flwr.supercore.constant import FORCE_EXIT_TIMEOUT_SECONDS  # the time limit of a regular exit

from fedclip_flwr.flower.patching import replace

SUPEREXEC = "flower-superexec"
"""What a SuperLink and a SuperNode start, and what starts all other processes."""


def end(status: int) -> None:
    """Exit at once: Python would wait for open connections."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_with_superexec(name: str) -> None:
    """From now on exit if the SuperExec that this process starts has ended: Flower has no hook for that."""
    start = subprocess.Popen.__init__

    def watch(superexec: subprocess.Popen[Any]) -> None:
        superexec.wait()
        time.sleep(FORCE_EXIT_TIMEOUT_SECONDS)  # on a regular stop this process exits meanwhile
        print(f"{SUPEREXEC} exited: stopping this {name}", file=sys.stderr)
        end(1)

    @functools.wraps(start)
    def started(self: Any, command: Any, *more: Any, **named: Any) -> None:
        start(self, command, *more, **named)
        if isinstance(command, list) and command[0] == SUPEREXEC:
            threading.Thread(target=watch, args=[self], daemon=True).start()

    replace(subprocess.Popen, __init__=started)
