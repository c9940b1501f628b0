"""A SuperNode that runs no other code than what its owner has installed.

A server sends each site the app that it is to run: whoever administers it could send anything. Here the process that
is to run it looks first whether its modules are those of the installed package, to the byte, and refuses others.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedclip_flwr import content
from fedclip_flwr.errors import UserError

COMMAND = "flwr-clientapp"
"""What a SuperNode starts, by name, to answer a message."""
ADDRESS = "--clientappio-api-address"
APPS, DESCRIBED, LIST = ("server_app.py", "client_app.py"), "pyproject.toml", ".info/CONTENT"
"""What is in a bundle: the apps, which must be this site's own, their description, and a list of all."""
LARGEST_TEXT, LARGEST = 2**14, 2**16
"""Bytes of the description and of the list, and of a whole bundle, at most; Flower makes one of some 20,000."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""How files may be packed. What zipfile unpacks in other ways can't be bounded."""


def start(options: Sequence[str]) -> NoReturn:
    """Becomes a SuperNode with these options, which listens to this machine only unless told otherwise."""
    folder = content.make_folder(content.home() / "bin")
    text = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m {__name__} "$@"\n'

    def write(path: Path) -> None:
        path.write_text(text)
        path.chmod(0o755)

    content.write_whole(folder / COMMAND, write)
    here = [] if any(option.partition("=")[0] == ADDRESS for option in options) else [ADDRESS, "127.0.0.1:9094"]
    path = [str(folder), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    command = [sys.executable, "-P", "-m", "fedclip_flwr.supernode", *options, *here]
    os.execve(command[0], command, {**os.environ, "PATH": os.pathsep.join(path)})


def answer() -> None:
    """Flower's own command, but for a look at what it is about to install and run."""
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    functions, name = vars(run_clientapp), "install_from_fab"
    install = functions[name]

    def checked(bundle: bytes, **more: Any) -> Any:
        check(bundle)
        return install(bundle, **more)

    functions[name] = checked
    flwr_clientapp()


def check(bundle: bytes) -> None:
    """Raises unless the app in the bundle is this package's own; no file of it is unpacked beyond the size of ours."""
    found = "can't be read"
    with contextlib.suppress(Exception):  # whatever a stranger has made of it
        found = _difference(bundle)
    if found:
        raise UserError(
            f"the server's app {found}; this site runs its owner's code only: install the same version of "
            "fedclip-flwr on both sides"
        )


def _difference(bundle: bytes) -> str:
    """How the bundle differs from this package's app; empty if it doesn't."""
    if len(bundle) > LARGEST:
        return f"is larger than {LARGEST:,} bytes"
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        missing = {*APPS, DESCRIBED, LIST}
        for entry in archive.infolist():
            if entry.filename not in missing or not _same(archive, entry):
                return f"brings another {entry.filename[:60]!r} than this site has"
            missing.remove(entry.filename)
    return f"lacks {min(missing)}" if missing else ""


def _same(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    """Whether the file is the one that this site has, or may differ from it."""
    name, own = entry.filename, b""
    if name != LIST:
        own = (content.own_app() / name).read_bytes()
    if entry.file_size > (len(own) if name in APPS else LARGEST_TEXT) or entry.compress_type not in METHODS:
        return False
    entry.file_size += 1  # zipfile would unpack what is beyond this size, and hide it
    with archive.open(entry) as file:
        data = file.read(entry.file_size)
    if len(data) == entry.file_size:
        return False
    return name == LIST or (_client_app(data) == _client_app(own) if name == DESCRIBED else data == own)


def _client_app(described: bytes) -> Any:
    return tomllib.loads(described.decode())["tool"]["flwr"]["app"]["components"]["clientapp"]


if __name__ == "__main__":
    answer()
