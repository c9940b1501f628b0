"""Files: read with retries, written completely or not at all; and the folder for data that outlives a run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from fedclip_flwr.base.errors import ReadError, UserError

PACKAGE = Path(__file__).parent.parent
T = TypeVar("T")
NOT_OUT_OF_SPACE = {errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS}
PERMANENT = {
    *(errno.EACCES, errno.EFBIG, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENODEV, errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.EPERM),
}
"""Errors that stay until somebody changes the file; others may pass, such as those of a network share."""
TRIES, PAUSE = 3, 0.1
"""How often a read is tried when its error may pass, and the seconds between the tries."""


def own_app() -> Path:
    """The folder of this package's Flower app; a wheel includes it."""
    packed = PACKAGE / "app"
    return packed if packed.is_dir() else PACKAGE.parent


def home() -> Path:
    """The folder of everything that outlives a run: FEDCLIP_HOME, or `~/.fedclip`."""
    return Path(os.environ.get("FEDCLIP_HOME") or "~/.fedclip").expanduser().absolute()


def may_read(path: Path) -> bool:
    """True if this user has permission to read it."""
    return os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


def with_retries(name: object, read: Callable[[], T]) -> T:
    """Returns `read()`. After an error that may pass it tries again, and in the end raises a `ReadError`.

    An error in `PERMANENT` is raised as it is.
    """
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE)
        try:
            return read()
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in PERMANENT:
                raise
            found = error
    why = found.strerror if isinstance(found, OSError) and found.strerror else str(found) or "out of memory"
    remedy = "check that its disk or network share responds and that memory is free, then try again"
    raise ReadError(name, f"can't be read now ({why})", remedy) from found


def opened(path: Path) -> BufferedReader:
    """The file, open for reading; `OSError` if it is not a regular file: a pipe would block, a device never ends."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a name that is not valid for any file
        raise OSError(errno.EINVAL, str(error)) from None
    except PermissionError as error:
        if may_read(path):  # such as on a network share whose ticket has expired
            raise OSError(errno.EAGAIN, f"{error.strerror} at the moment") from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(number, "rb")


def read_bytes(path: Path, most: int) -> bytes:
    """The file's bytes; `OSError` if there are more than `most`, or if it is not a regular file."""
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size <= most and len(data := file.read(most + 1)) <= most:
            return data
    raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")


def read_json(path: Path, most: int = 2**24) -> Any:
    """The file's parsed JSON; `OSError` or `ValueError` if it can't be read, whatever is in it."""
    return parsed(read_bytes(path, most).decode("utf-8"))


def read_header(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; errors as of `read_json`."""
    with opened(path) as file:
        header = parsed(file.read(min(int.from_bytes(file.read(8), "little"), 2**24)).decode("utf-8"))
    facts = header.get("__metadata__") if isinstance(header, dict) else None
    return {key: str(value) for key, value in facts.items()} if isinstance(facts, dict) else {}


def parsed(text: str) -> Any:
    """The parsed JSON; `ValueError` if the text is not valid JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextlib.contextmanager
def writing_to(folder: Path, setting: str = "FEDCLIP_HOME", mode: int = 0o777) -> Iterator[None]:
    """Makes the folder, and turns an `OSError` in the block into a `UserError`; `setting` is what sets the folder."""
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
        yield
    except OSError as error:
        room = "" if error.errno in NOT_OUT_OF_SPACE else "make room there, or "
        raise UserError(
            f"{folder} can't be written to ({error.strerror or error}): {room}set {setting} to another folder"
        ) from error


def make_folder(folder: Path, setting: str = "FEDCLIP_HOME", mode: int = 0o777) -> Path:
    """The folder, made if it does not exist."""
    with writing_to(folder, setting, mode):
        return folder


def write_atomic(
    path: Path,
    write: Callable[[Path], object],
    setting: str = "FEDCLIP_HOME",
    put: Callable[[Path, Path], object] = os.replace,
) -> None:
    """Lets `write` fill a temporary file, then moves it into place: `path` is never half-written.

    With `put=os.link`, a file that was created meanwhile is not overwritten.
    """
    with writing_to(path.parent, setting):
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            write(part)
            _sync(part)
            put(part, path)
            with contextlib.suppress(OSError):  # not every file system supports it
                _sync(path.parent)
        finally:
            part.unlink(missing_ok=True)


def unless_there(part: Path, path: Path) -> None:
    """As `put` of `write_atomic`: what another process has written meanwhile stays. Needs no hard links."""
    from filelock import FileLock  # it takes as long to import as all else here

    with FileLock(f"{path}.lock"):
        if not path.exists():
            os.replace(part, path)


def write_text(path: Path, text: str, setting: str = "FEDCLIP_HOME") -> None:
    """Writes the text in UTF-8, as `write_atomic` does."""
    write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"), setting)


def tidy(folder: Path, setting: str = "FEDCLIP_HOME") -> None:
    """Removes temporary files of `write_atomic` in killed processes; nothing may be writing to the folder now."""
    with writing_to(folder.parent, setting):
        for part in folder.glob(".*"):
            if re.fullmatch(r"\..+\.[0-9a-f]{16}", part.name) and part.is_file():
                part.unlink()


def _sync(path: Path) -> None:
    """Flushes a file's bytes, or a folder's names, to disk, so that they survive a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
