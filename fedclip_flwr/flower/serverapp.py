"""What a ServerApp needs and Flower does not make public."""

from __future__ import annotations

import logging
import threading
from typing import NoReturn

from flwr.common.exit import add_exit_handler as add_exit_handler  # a ServerApp that is stopped hears of it only here

from fedclip_flwr.base import UserError


def refuse(error: UserError) -> NoReturn:
    """Ends the ServerApp as failed, with the error's text as the last word: Flower would add several traces."""
    print(f"\nThis run can't continue. {error}", flush=True)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    threading.excepthook = lambda _: None  # a simulation runs the ServerApp in a thread
    raise error
