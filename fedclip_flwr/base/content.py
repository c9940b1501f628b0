"""Content hashes of files: keys under which results computed from the files are found again and never go stale.

Reading a model or ten thousand images for every message would cost more than the round itself. So the hashes are
remembered under the files' names, sizes, times and inodes: any write to a file changes its ctime.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.files import PACKAGE, home, may_read, opened, with_retries, write_text

UNREADABLE = "unreadable"
"""Stands in for the hash of a file that can't be read until somebody changes it."""
DAY = 24 * 3600.0
UNUSED = 90 * DAY
"""Seconds without use after which an entry about files or sessions is removed."""
PRUNABLE = re.compile(r"[0-9a-f]{32}|session-\w+|\..+\.[0-9a-f]{16}")
"""Names of such entries and of half-written files; the hub revision chosen for a model is kept."""
PRUNED = ".pruned"
"""The file whose time says when the entries were last pruned."""


def memory() -> Path:
    """The folder of the remembered entries."""
    return home() / "contents"


def digest(*parts: str | bytes) -> str:
    """A short hash of the parts, equal only if all parts are equal, one by one."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()[:32]


def recall(name: str, memory: Path) -> str | None:
    """The text remembered under the name; None if there is none or it is damaged."""
    try:
        mark, _, text = (memory / name).read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if mark != digest(text):
        return None
    mark_used(memory / name)
    return text


def mark_used(path: Path) -> None:
    """Sets the file's time to now, at most once a day, as the time of its last use; a missing file is ignored."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > DAY:
            os.utime(path)


def remember(name: str, text: str, memory: Path) -> None:
    """Stores the text under the name. A failed write is ignored: it only costs time later."""
    with contextlib.suppress(UserError):
        write_text(memory / name, f"{digest(text)}\n{text}")


def forget(name: str, memory: Path) -> None:
    """Removes the entry of that name, which turned out to be wrong."""
    with contextlib.suppress(OSError):
        (memory / name).unlink(missing_ok=True)


def remembered(name: str, make: Callable[[], str], memory: Path) -> str:
    """The text remembered under the name; if there is none, `make()` makes it and it is remembered."""
    text = recall(name, memory)
    if text is None:
        text = make()
        remember(name, text, memory)
        _prune(memory)
    return text


def _prune(memory: Path) -> None:
    """Once a day, removes entries that were not used for long: most are about files that no longer exist."""
    now = time.time()
    with contextlib.suppress(OSError):
        try:
            last = (memory / PRUNED).stat().st_mtime
        except FileNotFoundError:
            last = now  # the first pruning is tomorrow: until then, entries in use are marked
            (memory / PRUNED).touch()
        if now - last > DAY:
            os.utime(memory / PRUNED)  # first, so that other processes leave it to this one
            for entry in os.scandir(memory):
                with contextlib.suppress(OSError):
                    if PRUNABLE.fullmatch(entry.name) and now - entry.stat(follow_symlinks=False).st_mtime > UNUSED:
                        os.unlink(entry)


def state_of(root: Path, names: Sequence[str], *more: str) -> str:
    """A hash of the state of the files below `root`, without reading them, and of the texts in `more`."""
    return digest(*(part for name in names for part in (name, _facts(root / name))), *more)


def of_files(root: Path, names: Sequence[str], memory: Path) -> str:
    """The hash of the names and bytes of the files below `root`; their place and times do not count.

    Known hashes are remembered in the folder `memory`.
    """
    return remembered(
        state_of(root, names),
        lambda: digest(*(part for name in names for part in (name, of_file(root / name)))),
        memory,
    )


def _facts(path: Path) -> str:
    """Facts that change when the file is written to, or when this user gets permission to read it."""
    try:
        s = with_retries(path, path.stat)
    except OSError:
        return UNREADABLE
    facts = f"{s.st_size}/{s.st_mtime_ns}/{s.st_ctime_ns}/{s.st_ino}"
    return facts if may_read(path) else f"{facts}/{UNREADABLE}"


def of_bytes(data: bytes) -> str:
    """The hash of the bytes, equal to `of_file` of a file that holds them."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """The hash of its bytes; `UNREADABLE` if it is not a regular file, is missing, or this user may not read it."""

    def hashed() -> str:
        with opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        return with_retries(path, hashed)
    except OSError:
        return UNREADABLE


def of_package(memory: Path) -> str:
    """The hash of this installed package: its code and its model, without the apps that a wheel includes."""
    names = sorted(
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".json", ".txt", ".safetensors") and path.parent != PACKAGE / "app"
    )
    return of_files(PACKAGE, names, memory)


def file_name(text: str) -> str:
    """The text as the name of a file or folder: unchanged if valid, else cleaned and made unique by a hash."""
    plain = re.sub(r"[^\w.-]", "_", text).lstrip(".")[:80]
    return plain if plain == text else f"{plain}-{digest(text)[:8]}"
