"""A SuperNode that runs only the code that its owner has installed.

A server sends each site the app that it runs, so the server's administrator could send any code. This SuperNode accepts
only a bundle whose modules equal those of the installed package, byte for byte, and the process that answers a message
runs the installed app: a bundle is never unpacked to disk.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedclip_flwr.base import UserError, files
from fedclip_flwr.flower import lines
from fedclip_flwr.flower.patching import replace

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp


COMMAND = "flwr-clientapp"
"""The program that a SuperNode starts, by name, to answer a message; Flower calls this kind of task so, too."""
LISTENS = "127.0.0.1:9094"
"""Where a site listens by default: only this machine reaches it."""
APPS, DESCRIBED, LIST = ("server_app.py", "client_app.py"), "pyproject.toml", ".info/CONTENT"
"""The files of a bundle: the apps, which must equal this site's, their description, and a list of all files."""
LARGEST_TEXT, LARGEST = 2**14, 2**16
"""Maximum bytes of the description and of the list, and of a bundle; Flower's bundle has about 20,000."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Allowed compression methods: zipfile can't limit the output of others."""


def start(options: Sequence[str]) -> NoReturn:
    """Replace this process by a SuperNode with these options; by default it listens only on this machine."""
    lines.warn()
    listening, others = _listening(options)
    given = _read(others)
    if given.isolation != "subprocess":
        raise UserError(
            "--isolation: another program would answer for this site, with any code from the server; leave it out"
        )
    if given.runtime_dependency_install:
        raise UserError(
            "--allow-runtime-dependency-installation: the server would choose what is installed and run; leave it out"
        )
    folder = files.make_folder(files.home() / "bin")
    for task in lines.module("programs").TASKS:
        _write(folder / task, "pinned" if task == COMMAND else "refusing")
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for task in lines.module("programs").TASKS:
        _require(folder / task, path)
    command = [sys.executable, "-P", "-m", "fedclip_flwr.flower.supernode", *others, *listening]
    os.execve(command[0], command, {**os.environ, "PATH": path})


def _listening(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options for the address at which the site listens, and all others."""
    from flwr.supercore.address import parse_address  # addresses, as the flags are read

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--clientappio-api-address", dest="address", default=LISTENS)
    given, others = parser.parse_known_args(options)
    found = parse_address(given.address)
    if not found or not lines.is_loopback(found[0]):
        raise UserError(
            f"--clientappio-api-address {given.address}: anyone who reaches it can answer for this site; give an "
            f"address of this machine only, such as {LISTENS}"
        )
    if given_too := {option.partition("=")[0] for option in others} & {*lines.line().site_address}:
        raise UserError(f"{' and '.join(sorted(given_too))}: give --clientappio-api-address HOST:PORT instead")
    return lines.address(lines.line().site_address, given.address), others


def _read(options: Sequence[str]) -> argparse.Namespace:
    """The options, as Flower reads them."""
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode  # its flags: no public parser

    return _parse_args_run_supernode().parse_args(options)


def _write(program: Path, module: str) -> None:
    """Write a program that runs that module of this wing."""
    text = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m {__package__}.{module} "$@"\n'

    def write(path: Path) -> None:
        path.write_text(text)
        path.chmod(0o755)

    files.write_atomic(program, write)


def _require(program: Path, path: str) -> None:
    """Raise unless Flower, with that PATH, starts this program for its kind of task."""
    found = None
    with contextlib.suppress(Exception):  # another version of Flower can raise anything
        found = _started(program.name, path)
    if found != str(program):
        raise UserError(
            f"Flower would not start {program} for a task, but {found or 'another program'}: set FEDCLIP_HOME "
            "to a folder where programs can run, or install the version of flwr that this package requires"
        )


def _started(task: str, path: str) -> str | None:
    """The program that Flower would start for such a task, with that PATH; nothing is started."""
    started: list[tuple[Sequence[str], dict[str, Any]]] = []
    functions, name = vars(subprocess), "Popen"
    popen = functions[name]
    functions[name] = lambda command, **more: started.append((command, more))
    try:
        lines.module("programs").start(task)
    finally:
        functions[name] = popen
    ((command, more),) = started
    more = {key: value for key, value in more.items() if key not in ("stdout", "stderr")}
    return None if more else shutil.which(command[0], path=path)


def answer() -> None:
    """Flower's own command, changed to run the installed app and to unpack no bundle."""
    from flwr.supernode.cli import flwr_clientapp  # the command as a function
    from flwr.supernode.runtime import run_clientapp  # where it unpacks and loads an app: no hook to choose another

    replace(
        run_clientapp,
        install_from_fab=lambda bundle, **_: check(bundle),
        get_load_client_app_fn=lambda **_: lambda *_: own_client_app(),  # Flower's uses the server's path
    )
    flwr_clientapp()


def own_client_app() -> ClientApp:
    """The ClientApp of this package, loaded by path: the current folder may hold another one."""
    path = files.own_app() / "client_app.py"
    spec = importlib.util.spec_from_file_location("fedclip_client_app", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app: ClientApp = module.app
    return app


def check(bundle: bytes) -> None:
    """Raise unless the app in the bundle equals this package's; unpacks no more of a file than ours has."""
    problem = "can't be read"
    with contextlib.suppress(Exception):  # a malicious bundle can raise anything
        problem = _difference(bundle)
    if problem:
        raise UserError(
            f"the server's app {problem}; this site runs only installed code: install the same version of "
            "fedclip-flwr on both sides"
        )


def _difference(bundle: bytes) -> str:
    """The difference between the bundle and this package's app; empty if there is none."""
    if len(bundle) > LARGEST:
        return f"is larger than {LARGEST:,} bytes"
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        missing = {*APPS, DESCRIBED, LIST}
        for entry in archive.infolist():
            if entry.filename not in missing or not _same(archive, entry):
                return f"differs from this site's in {entry.filename[:60]!r}"
            missing.remove(entry.filename)
    return f"lacks {min(missing)}" if missing else ""


def _same(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    """True if the file equals this site's or differs only where it may, and has no hidden data after its end."""
    name = entry.filename
    own = b"" if name == LIST else (files.own_app() / name).read_bytes()
    if entry.file_size > (len(own) if name in APPS else LARGEST_TEXT) or entry.compress_type not in METHODS:
        return False
    entry.file_size += 1  # zipfile returns no more than this: one byte more reveals hidden data
    with archive.open(entry) as file:
        data = file.read(entry.file_size)
    if len(data) == entry.file_size:
        return False
    return name == LIST or (_components(data) == _components(own) if name == DESCRIBED else data == own)


def _components(described: bytes) -> Any:
    """The parts of the app that Flower could run at a site."""
    return tomllib.loads(described.decode())["tool"]["flwr"]["app"]["components"]


if __name__ == "__main__":
    answer()
