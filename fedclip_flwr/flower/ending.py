"""Ends a process of Flower's that can no longer do its work, where systemd or Docker start it again."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

from flwr.supercore.constant import FORCE_EXIT_TIMEOUT_SECONDS  # the time limit of a regular exit


def end(status: int) -> None:
    """Exit at once: Python would wait for open connections."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_with_a_child(name: str) -> None:
    """From now on exit if the child process ends: it is flower-superexec, which starts all others."""

    def watch() -> None:
        while True:
            with contextlib.suppress(ChildProcessError):  # no child yet
                os.waitpid(-1, 0)
                time.sleep(FORCE_EXIT_TIMEOUT_SECONDS)  # on a regular stop this process exits meanwhile
                print(f"flower-superexec exited: stopping this {name}", file=sys.stderr)
                end(1)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()
