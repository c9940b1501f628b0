"""State that are made once and read from then on, also by several processes at once.

An entry is a safetensors file. It is written whole or not at all, memory-mapped, and checked when it is read for the
first time since it was written to. Large ones grow batch by batch, see `growing.py`.
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
"""For so many seconds a file can be written to again without a change of its times."""


def kept(path: Path, make: Callable[[], tuple[State, dict[str, str]]]) -> tuple[State, Facts]:
    """The store's entry at `path`; made if it is missing or damaged, by one process while the others wait."""
    return _kept(path, lambda: _write(path, *make()))


def grown(path: Path, count: int, grow: Callable[[Growing], None]) -> tuple[State, Facts]:
    """The same of an entry for so many images, which `grow` completes from wherever it was left."""

    def fill() -> None:
        with Growing(path, count) as growing:
            grow(growing)
            growing.finish()

    return _kept(path, fill)


def _kept(path: Path, fill: Callable[[], None]) -> tuple[State, Facts]:
    entry = read(path)
    if entry:
        content.mark_used(Path(f"{path}.lock"))  # not the entry: it would be taken for one that was written to
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
        raise UserError(
            f"features stored in {path} come back damaged: check the disk, or let FEDCLIP_HOME name another"
        )
    return entry


def _write(path: Path, tensors: State, facts: dict[str, str]) -> None:
    """Called by one process at a time: what a killed one left half-written is removed."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()
    sums = {name: (tensorfile.spec_of(tensor), tensorfile.crc_of(tensor)) for name, tensor in tensors.items()}
    facts = {**facts, "checksum": tensorfile.checksum(facts, sums)}
    files.write_whole(path, lambda part: files.save_tensors(tensors, part, facts))


def read(path: Path) -> tuple[State, Facts] | None:
    """The entry, if it is there and whole."""
    try:
        tensors, facts = mapped(path)
        claimed = facts.pop("checksum", "")
        if found_once(path, f"checksum {claimed}", lambda: tensorfile.checksum_of_file(path, facts) == claimed):
            return tensors, facts
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        pass
    log.warning("stored features are damaged and will be made again: %s", path)
    return None


def found_once(path: Path, what: str, look: Callable[[], bool]) -> bool:
    """Whether the file is as `look` finds; once it was, that is remembered until the file is written to."""
    name = content.state_of(path.parent, [path.name], what)
    if content.recall(name, content.memory()):
        return True
    if not look():
        return False
    settled = time.time() - path.stat().st_ctime > FRESH
    if settled and name == content.state_of(path.parent, [path.name], what):
        content.remember(name, what, content.memory())
    return True


def mapped(path: Path) -> tuple[State, dict[str, str]]:
    """The file's tensors, memory-mapped, and its metadata."""
    files.opened(path).close()  # a pipe would be waited for
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (RuntimeError, ValueError, TypeError, AttributeError, OverflowError) as error:  # torch can't have such ones
        raise SafetensorError(f"it holds tensors that can't be ({error})") from None
