"""Private names of Flower that a ServerApp needs."""

from __future__ import annotations

import logging
import threading
from typing import NoReturn

from flwr.common.exit import add_exit_handler as add_exit_handler  # the only notice of a stop

from fedclip_flwr.base import UserError


def refuse(error: UserError) -> NoReturn:
    """End the ServerApp as failed, with the error's text as the last output: Flower would add several tracebacks."""
    print(f"\nThis run can't continue. {error}", flush=True)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    threading.excepthook = lambda _: None  # a simulation runs the ServerApp in a thread
    raise error
