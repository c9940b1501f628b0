"""Processes that a test has started, found by a mark in their environment."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path


def alive(mark: str) -> list[dict[str, str]]:
    """The environments of the processes that have the mark in them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            pairs = (process / "environ").read_text(errors="replace").split("\0")
            if mark in pairs:
                found.append(dict(pair.split("=", 1) for pair in pairs if "=" in pair))
    return found


def until_gone(mark: str) -> None:
    """Waits until there are none."""
    deadline = time.monotonic() + 60
    while still := alive(mark):
        assert time.monotonic() < deadline, still
        time.sleep(0.1)
