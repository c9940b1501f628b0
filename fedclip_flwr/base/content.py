"""Content hashes of files, so that what was computed from them can be found again and never goes stale.

Reading a model or ten thousand images for every message would cost more than the round itself. So what was found out
about files is remembered under their names, sizes, times and inodes: whatever is written to a file changes its ctime.
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
from fedclip_flwr.base.files import PACKAGE, home, may_read, opened, patiently, write_whole

UNREADABLE = "unreadable"
"""In the place of a hash: the file can't be read, and won't be until it is changed."""
DAY = 24 * 3600.0
UNUSED = 90 * DAY
"""What is remembered of files and sessions goes after so many seconds without use."""
GOES = re.compile(r"[0-9a-f]{32}|session-\w+|\..+\.[0-9a-f]{16}")
"""Its names, and of what was left half-written; which revision of the hub's was taken for a model is kept."""
PRUNED = ".pruned"
"""The file that tells when what is remembered was last looked through."""


def memory() -> Path:
    """Where what was found out about files is remembered."""
    return home() / "contents"


def digest(*parts: str | bytes) -> str:
    """A short name for the parts: equal only if they are, one by one."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:32]


def recall(name: str, memory: Path) -> str | None:
    """The text that was remembered under that name, if it is there and whole."""
    try:
        mark, _, text = (memory / name).read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if mark != digest(text):
        return None
    mark_used(memory / name)
    return text


def mark_used(path: Path) -> None:
    """The file's time tells when it was last used, to the day; nothing is done where there is no such file."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > DAY:
            os.utime(path)


def remember(name: str, text: str, memory: Path) -> None:
    """Keeps the text; if it can't be kept, no more than time is lost."""
    with contextlib.suppress(UserError):
        write_whole(memory / name, lambda path: path.write_text(f"{digest(text)}\n{text}", encoding="utf-8"))


def forget(name: str, memory: Path) -> None:
    """What was remembered under that name turned out to be wrong."""
    with contextlib.suppress(OSError):
        (memory / name).unlink(missing_ok=True)


def remembered(name: str, make: Callable[[], str], memory: Path) -> str:
    """The text of that name, made if need be."""
    text = recall(name, memory)
    if text is None:
        text = make()
        remember(name, text, memory)
        _prune(memory)
    return text


def _prune(memory: Path) -> None:
    """Once a day, removes what has not been used for long: mostly it is about files that are gone."""
    now = time.time()
    with contextlib.suppress(OSError):
        try:
            last = (memory / PRUNED).stat().st_mtime
        except FileNotFoundError:
            last = now  # until tomorrow, what is in use is marked as such
            (memory / PRUNED).touch()
        if now - last > DAY:
            os.utime(memory / PRUNED)  # first, so that other processes leave it to this one
            for entry in os.scandir(memory):
                with contextlib.suppress(OSError):
                    if GOES.fullmatch(entry.name) and now - entry.stat(follow_symlinks=False).st_mtime > UNUSED:
                        os.unlink(entry)


def state_of(root: Path, names: Sequence[str], *more: str) -> str:
    """A name for the files below `root` as they are now, without reading them, and for whatever else matters."""
    return digest(*(part for name in names for part in (name, _facts(root / name))), *more)


def of_files(root: Path, names: Sequence[str], memory: Path) -> str:
    """The hash of the named files below `root`: of their names and bytes, not of where or when they are.

    `memory` is the folder in which known hashes are remembered.
    """
    return remembered(
        state_of(root, names),
        lambda: digest(*(part for name in names for part in (name, of_file(root / name)))),
        memory,
    )


def _facts(path: Path) -> str:
    """What can't stay the same when the file is written to, or when this user may read it from now on."""
    try:
        s = patiently(path, path.stat)
    except OSError:
        return UNREADABLE
    facts = f"{s.st_size}/{s.st_mtime_ns}/{s.st_ctime_ns}/{s.st_ino}"
    return facts if may_read(path) else f"{facts}/{UNREADABLE}"


def of_bytes(data: bytes) -> str:
    """The same as of a file that holds them."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """The hash of its bytes; `UNREADABLE` of what is no file, a link to nothing, or nothing for this user."""

    def hashed() -> str:
        with opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        return patiently(path, hashed)
    except OSError:
        return UNREADABLE


def of_package(memory: Path) -> str:
    """The hash of this installed package: its code and its model, but not the apps that a wheel carries along."""
    names = sorted(
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".json", ".txt", ".safetensors") and path.parent != PACKAGE / "app"
    )
    return of_files(PACKAGE, names, memory)


def file_name(text: str) -> str:
    """The text as the name of a file or folder: unchanged if it may be one, else with a mark that keeps it apart."""
    plain = re.sub(r"[^\w.-]", "_", text).lstrip(".")[:80]
    return plain if plain == text else f"{plain}-{digest(text)[:8]}"
