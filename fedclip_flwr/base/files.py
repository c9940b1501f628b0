"""Files: read with patience, written completely or not at all; and where this package keeps what outlives a run."""

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
from typing import TYPE_CHECKING, Any, TypeVar

from fedclip_flwr.base.errors import ReadError, UserError

if TYPE_CHECKING:
    from torch import Tensor


PACKAGE = Path(__file__).parent.parent
T = TypeVar("T")
NO_MATTER_OF_ROOM = {errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS}
LASTING = {
    *(errno.EACCES, errno.EFBIG, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENODEV, errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.EPERM),
}
"""Errors that last until somebody changes the file; others may pass, such as those of a network share."""
TRIES, PAUSE = 3, 0.1
"""So often what may pass is tried, with so many seconds between."""


def own_app() -> Path:
    """The folder of the Flower app that belongs to this package: a wheel carries it along."""
    packed = PACKAGE / "app"
    return packed if packed.is_dir() else PACKAGE.parent


def home() -> Path:
    """Where everything that outlives a run is kept."""
    return Path(os.environ.get("FEDCLIP_HOME") or "~/.fedclip").expanduser().absolute()


def may_read(path: Path) -> bool:
    """Whether this user has the permission."""
    return os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


def patiently(name: object, read: Callable[[], T]) -> T:
    """What `read` gives. An error that may pass is waited for a little, and then raised as a `ReadError`.

    One that lasts is raised as it is.
    """
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE)
        try:
            return read()
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in LASTING:
                raise
            found = error
    why = found.strerror if isinstance(found, OSError) and found.strerror else str(found) or "out of memory"
    remedy = "see that its disk or network share answers and that there is memory left, then try again"
    raise ReadError(name, f"can't be read now ({why})", remedy) from found


def opened(path: Path) -> BufferedReader:
    """The file to be read; `OSError` if it is none: a pipe would be waited for, and a device never ends."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a name that no file can have
        raise OSError(errno.EINVAL, str(error)) from None
    except PermissionError as error:
        if may_read(path):  # such as on a network share whose ticket has expired
            raise OSError(errno.EAGAIN, f"{error.strerror} at the moment") from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no file")
    return os.fdopen(number, "rb")


def read_bytes(path: Path, most: int) -> bytes:
    """What the file holds; `OSError` if that is more than so many bytes, or if it is no file."""
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size <= most and len(data := file.read(most + 1)) <= most:
            return data
    raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")


def read_json(path: Path, most: int = 2**24) -> Any:
    """What the file tells; `OSError` or `ValueError` if it can't be read, whoever has written it."""
    return parsed(read_bytes(path, most).decode("utf-8"))


def read_header(path: Path) -> dict[str, str]:
    """The facts in the header of a safetensors file; errors as above."""
    with opened(path) as file:
        told = parsed(file.read(min(int.from_bytes(file.read(8), "little"), 2**24)).decode("utf-8"))
    facts = told.get("__metadata__") if isinstance(told, dict) else None
    return {key: str(value) for key, value in facts.items()} if isinstance(facts, dict) else {}


def parsed(text: str) -> Any:
    """What the JSON tells; `ValueError` if it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("one thing lies in another too many times") from None


@contextlib.contextmanager
def writing_to(folder: Path, setting: str = "FEDCLIP_HOME", mode: int = 0o777) -> Iterator[None]:
    """Tells the user what to do when the folder can't be written to; `setting` names it."""
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
        yield
    except OSError as error:
        room = "" if error.errno in NO_MATTER_OF_ROOM else "make room there, or "
        raise UserError(
            f"{folder} can't be written to ({error.strerror or error}): {room}let {setting} name another folder"
        ) from error


def make_folder(folder: Path, setting: str = "FEDCLIP_HOME", mode: int = 0o777) -> Path:
    """The folder, made if need be."""
    with writing_to(folder, setting, mode):
        return folder


def write_whole(
    path: Path,
    write: Callable[[Path], object],
    setting: str = "FEDCLIP_HOME",
    put: Callable[[Path, Path], object] = os.replace,
) -> None:
    """Lets `write` fill a temporary file and puts it in place at once: `path` is never half-written.

    With `os.link` to put it there, a file that has come meanwhile is not overwritten.
    """
    with writing_to(path.parent, setting):
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            write(part)
            _to_disk(part)
            put(part, path)
            with contextlib.suppress(OSError):  # not every file system can
                _to_disk(path.parent)
        finally:
            part.unlink(missing_ok=True)


def tidy(folder: Path, setting: str = "FEDCLIP_HOME") -> None:
    """Removes what `write_whole` has left there in processes that were killed; nobody may be writing there now."""
    with writing_to(folder.parent, setting):
        for part in folder.glob(".*"):
            if re.fullmatch(r"\..+\.[0-9a-f]{16}", part.name) and part.is_file():
                part.unlink()


def _to_disk(path: Path) -> None:
    """So that it is still there after a power cut: the bytes of a file, or the names in a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def save_tensors(tensors: dict[str, Tensor], path: Path, facts: dict[str, str]) -> None:
    """A safetensors file, its `facts` in the header."""
    from safetensors import SafetensorError  # not for those who only write keys: it brings torch
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, facts)
        path.chmod(mode)  # as of any other file: safetensors would let the owner alone read it
    except SafetensorError as error:  # a full disk, in safetensors' words
        raise OSError(str(error)) from error
