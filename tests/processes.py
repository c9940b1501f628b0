"""Processes that a test has started, found by a mark in their environment."""

from __future__ import annotations

import os
import signal
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


def kill(mark: str, command: str) -> int:
    """Ends those that have the mark and run that command, with SIGKILL; how many there were."""
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_text(errors="replace").split("\0")
            if mark in (process / "environ").read_text(errors="replace").split("\0") and any(
                Path(word).name == command for word in words
            ):
                os.kill(int(process.name), signal.SIGKILL)
                killed += 1
    return killed


def until_gone(mark: str) -> None:
    """Waits until there are none."""
    deadline = time.monotonic() + 60
    while still := alive(mark):
        assert time.monotonic() < deadline, still
        time.sleep(0.1)
