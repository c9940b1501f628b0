"""A store of tensors that are made once and then read, also by several processes at once.

An entry is a safetensors file. It is written completely or not at all, memory-mapped, and checked at the first read
after each write. Large entries grow batch by batch, see `growing.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from fedclip_flwr.base import content, files, tensorfile
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.growing import Growing
from fedclip_flwr.base.tensors import State

log = logging.getLogger(__name__)
Facts = Mapping[str, str]
FRESH = 0.1
"""Seconds within which a file may be written to again without a change of its times."""


def load_or_make(path: Path, make: Callable[[], tuple[State, dict[str, str]]]) -> tuple[State, Facts]:
    """The entry at `path`. If it is missing or damaged, one process makes it while the others wait."""
    return _load(path, lambda: _write(path, *make()))


def load_or_grow(path: Path, count: int, grow: Callable[[Growing], None]) -> tuple[State, Facts]:
    """The entry for `count` images at `path`. If need be, `grow` completes it from where an earlier process stopped."""

    def fill() -> None:
        with Growing(path, count) as growing:
            grow(growing)
            growing.finish()

    return _load(path, fill)


def _load(path: Path, fill: Callable[[], None]) -> tuple[State, Facts]:
    entry = read(path)
    if entry:
        content.mark_used(Path(f"{path}.lock"))  # not the entry: a new time would count as a write
        return entry
    lock = FileLock(f"{path}.lock")
    with files.writing_to(path.parent):
        try:
            lock.acquire(timeout=2)
        except Timeout:
            log.warning("waiting for another process that is encoding the same features")
            lock.acquire()
    try:
        entry = read(path)
        if not entry:
            fill()
            entry = read(path)
    finally:
        lock.release()
    if not entry:
        raise UserError(f"features stored in {path} are corrupt: check the disk, or set FEDCLIP_HOME to another one")
    return entry


def _write(path: Path, tensors: State, facts: dict[str, str]) -> None:
    """Called by one process at a time. Removes half-written files of killed processes."""
    for part in path.parent.glob(f".{path.name}.*"):
        part.unlink()
    facts = tensorfile.with_checksum(facts, tensors)
    files.write_atomic(path, lambda part: tensorfile.save(tensors, part, facts))


def read(path: Path) -> tuple[State, Facts] | None:
    """The entry; None if it is missing or damaged."""
    try:
        tensors, facts = mapped(path)
        claimed = facts.pop("checksum", "")
        if passes_once(path, f"checksum {claimed}", lambda: tensorfile.checksum_of_file(path, facts) == claimed):
            return tensors, facts
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        pass
    log.warning("stored features are corrupt and will be made again: %s", path)
    return None


def passes_once(path: Path, what: str, look: Callable[[], bool]) -> bool:
    """True if the file passes the check `look`. A pass is remembered under `what` until the file is written to."""
    name = content.state_of(path.parent, [path.name], what)
    if content.recall(name, content.memory()):
        return True
    if not look():
        return False
    settled = time.time() - path.stat().st_ctime > FRESH
    if settled and name == content.state_of(path.parent, [path.name], what):
        content.remember(name, what, content.memory())
    return True


def checked(path: Path) -> tuple[State, dict[str, str]]:
    """As `mapped`; a `SafetensorError` if the file does not have the checksum in its metadata."""
    tensors, facts = mapped(path)
    claimed = facts.pop("checksum", "")
    if tensorfile.checksum_of_file(path, facts) != claimed:
        raise SafetensorError("checksum mismatch")
    return tensors, facts


def mapped(path: Path) -> tuple[State, dict[str, str]]:
    """The file's tensors, memory-mapped, and its metadata."""
    files.opened(path).close()  # raises on a pipe, which would block
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (RuntimeError, ValueError, TypeError, AttributeError, OverflowError) as error:  # as torch raises them
        raise SafetensorError(f"invalid tensors ({error})") from None
