"""Private names of Flower that a ServerApp needs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NoReturn

from fedclip_flwr.base import UserError
from fedclip_flwr.flower import lines


def add_exit_handler(call: Callable[[], None]) -> None:
    """Call this when the ServerApp's process is stopped: Flower gives no other notice."""
    lines.module("messages").add_exit_handler(call)


def refuse(error: UserError) -> NoReturn:
    """End the ServerApp as failed, with the error's text as the last output: Flower would add several tracebacks."""
    print(f"\nThis run can't continue. {error}", flush=True)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    threading.excepthook = lambda _: None  # a simulation runs the ServerApp in a thread
    raise error
