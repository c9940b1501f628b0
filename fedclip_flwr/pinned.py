"""A SuperNode that runs no other code than what its owner has installed.

A server sends each site the app that it is to run: whoever administers it could send anything. Here the process that
is to run it looks first whether its modules are those of the installed package, to the byte, and refuses others.
"""

from __future__ import annotations

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
APPS, LIST = ("server_app.py", "client_app.py"), ".info/CONTENT"
"""What is in a bundle besides `pyproject.toml`."""


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
    """Raises unless the app in the bundle is this package's own."""
    own = content.own_app()
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        for entry in archive.infolist():  # every one: a name may be there twice
            name, data = entry.filename, archive.read(entry)
            if name == "pyproject.toml":
                same = _client_app(data) == _client_app((own / name).read_bytes())
            else:
                same = name == LIST or (name in APPS and data == (own / name).read_bytes())
            if not same:
                raise UserError(
                    f"the server's app brings another {name[:60]!r} than this site has, which runs its owner's "
                    "code only: install the same version of fedclip-flwr on both sides"
                )


def _client_app(described: bytes) -> Any:
    return tomllib.loads(described.decode())["tool"]["flwr"]["app"]["components"]["clientapp"]


if __name__ == "__main__":
    answer()
