"""This machine in words, its processes and their memory; Markdown tables of figures."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

OURS = Path(__file__).parent.parent
"""The checkout, which is also this project's Flower app."""


def machine() -> str:
    """The machine and the versions, in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("flwr", "torch", "transformers"))
    return f"{os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}, {versions}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def processes(command: str, mark: str) -> list[int]:
    """The processes that run this command with the mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(Path(word).name == command for word in words[:2]):
                environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                found += [int(process.name)] * (mark in environment)
    return found


def cpu(process: int) -> float:
    """The seconds for which a process has computed so far; 0 where that is not to be known."""
    after_name = stat(process)
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK") if after_name else 0.0


def stat(process: int) -> list[str]:
    """What the kernel says of a process, from its state on; nothing where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return []


def memory(process: int, what: str) -> int:
    """A process's memory in bytes: VmRSS now, VmHWM at most so far; 0 where that is not to be known."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return 1024 * int(line.split()[1])
    return 0
