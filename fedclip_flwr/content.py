"""Content hashes of files, so that what was computed from them can be found again and never goes stale.

Reading a model or ten thousand images for every message would cost more than the round itself. So a hash is remembered
under the names, sizes, times and inodes of the files it was made from: whatever is written to a file changes its ctime.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedclip_flwr.errors import UserError

PACKAGE = Path(__file__).parent
NO_MATTER_OF_ROOM = {errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS}


def digest(*parts: str | bytes) -> str:
    """A short name for the parts: equal only if they are, one by one."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:32]


def of_files(root: Path, names: Sequence[str], memory: Path) -> str:
    """The hash of the named files below `root`: of their names and bytes, not of where or when they are.

    `memory` is the folder in which known hashes are remembered.
    """
    known = memory / digest(*(part for name in names for part in (name, _facts(root / name))))
    try:
        found = known.read_text()
    except (OSError, UnicodeDecodeError):
        found = ""
    if len(found) == 32:
        return found
    made = digest(*(part for name in names for part in (name, _of_file(root / name))))
    with contextlib.suppress(UserError):  # it could not be remembered: no more than time is lost
        write_whole(known, lambda path: path.write_text(made))
    return made


def _facts(path: Path) -> str:
    """What can't stay the same when the file is written to."""
    try:
        s = path.stat()
    except OSError:
        return "unreadable"
    return f"{s.st_size}/{s.st_mtime_ns}/{s.st_ctime_ns}/{s.st_ino}"


def _of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # no permission, a link to nothing, a folder: whoever opens it will say so
        return "unreadable"


def of_package(memory: Path) -> str:
    """The hash of this installed package: its code and its model, but not the apps that a wheel carries along."""
    names = sorted(
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".json", ".txt", ".safetensors") and path.parent != PACKAGE / "app"
    )
    return of_files(PACKAGE, names, memory)


@contextlib.contextmanager
def writing_to(folder: Path, setting: str = "FEDCLIP_HOME") -> Iterator[None]:
    """Tells the user what to do when the folder can't be written to; `setting` names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        room = "" if error.errno in NO_MATTER_OF_ROOM else "make room there, or "
        raise UserError(
            f"{folder} can't be written to ({error.strerror or error}): {room}let {setting} name another folder"
        ) from error


def make_folder(folder: Path, setting: str = "FEDCLIP_HOME") -> Path:
    """The folder, made if need be."""
    with writing_to(folder, setting):
        return folder


def write_whole(path: Path, write: Callable[[Path], object], setting: str = "FEDCLIP_HOME") -> None:
    """Lets `write` fill a temporary file and puts it in place at once: `path` is never half-written."""
    with writing_to(path.parent, setting):
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            write(part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, facts: dict[str, str]) -> None:
    """A safetensors file, its `facts` in the header."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, facts)
        path.chmod(mode)  # as of any other file: safetensors would let the owner alone read it
    except SafetensorError as error:  # a full disk, in safetensors' words
        raise OSError(str(error)) from error
