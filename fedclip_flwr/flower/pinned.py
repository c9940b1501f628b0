"""A SuperNode that runs no other code than what its owner has installed.

A server sends each site the app that it is to run: whoever administers it could send anything. Here the SuperNode takes
only a bundle whose modules are those of the installed package, to the byte, and the process that answers a message runs
the installed app: a bundle is never unpacked to disk.
"""

from __future__ import annotations

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

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp


COMMAND = "flwr-clientapp"
"""What a SuperNode starts, by name, to answer a message."""
APPS, DESCRIBED, LIST = ("server_app.py", "client_app.py"), "pyproject.toml", ".info/CONTENT"
"""What is in a bundle: the apps, which must be this site's own, their description, and a list of all."""
LARGEST_TEXT, LARGEST = 2**14, 2**16
"""Bytes of the description and of the list, and of a whole bundle, at most; Flower makes one of some 20,000."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""How files may be packed. What zipfile unpacks in other ways can't be bounded."""


def start(options: Sequence[str]) -> NoReturn:
    """Becomes a SuperNode with these options, which listens to this machine only unless told otherwise."""
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode  # its flags: nothing else tells them

    parser = _parse_args_run_supernode()
    parser.set_defaults(clientappio_api_address="127.0.0.1:9094")
    given = parser.parse_args(options)
    if given.isolation != "subprocess":
        raise UserError(
            "--isolation: another program would answer for this site, with any code that comes; leave it out"
        )
    if given.runtime_dependency_install:
        raise UserError(
            "--allow-runtime-dependency-installation: the server would choose what is installed and run; leave it out"
        )
    folder = files.make_folder(files.home() / "bin")
    text = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m {__name__} "$@"\n'

    def write(path: Path) -> None:
        path.write_text(text)
        path.chmod(0o755)

    files.write_whole(folder / COMMAND, write)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    _require(folder / COMMAND, path)
    here = ["--clientappio-api-address", given.clientappio_api_address]
    command = [sys.executable, "-P", "-m", "fedclip_flwr.flower.supernode", *options, *here]
    os.execve(command[0], command, {**os.environ, "PATH": path})


def _require(program: Path, path: str) -> None:
    """Raises unless Flower, with that PATH, starts this program for each message."""
    found = None
    with contextlib.suppress(Exception):  # of a Flower that has other ways
        found = _answering(path)
    if found != str(program):
        raise UserError(
            f"Flower would not have messages answered by {program}, but by {found or 'something else'}: let "
            "FEDCLIP_HOME name another folder, where programs can run, or install the flwr that this package asks for"
        )


def _answering(path: str) -> str | None:
    """The program that Flower starts for a message, with that PATH: it does so here, and nothing is started."""
    from flwr.common.constant import ExecPluginType  # a SuperNode's plugins: no setting or hook says which program
    from flwr.common.typing import Run  # one is made with a run,
    from flwr.proto.task_pb2 import Task  # and starts a program for a task
    from flwr.supercore.cli.flower_superexec import _get_plugin_and_stub_class  # the plugin for ClientApps
    from flwr.supercore.constant import ExecutorType, TaskType  # in a subprocess, for a ClientApp
    from flwr.supercore.superexec.executor import get_executor  # what starts that

    started: list[tuple[Sequence[str], dict[str, Any]]] = []
    kind, _ = _get_plugin_and_stub_class(ExecPluginType.CLIENT_APP)
    plugin = kind("127.0.0.1:9094", True, None, Run.create_empty, executor=get_executor(ExecutorType.SUBPROCESS))
    functions, name = vars(subprocess), "Popen"
    popen = functions[name]
    functions[name] = lambda command, **more: started.append((command, more))
    try:
        plugin.launch_task("token", Task(task_id=1, type=TaskType.CLIENT_APP))
    finally:
        functions[name] = popen
    ((command, more),) = started
    return None if more else shutil.which(command[0], path=path)


def answer() -> None:
    """Flower's own command, which here runs the installed app, and unpacks none that comes."""
    from flwr.supernode.cli import flwr_clientapp  # the command as a function
    from flwr.supernode.runtime import run_clientapp  # where it unpacks and loads an app: no hook to choose another

    own = {
        "install_from_fab": lambda bundle, **_: check(bundle),
        "get_load_client_app_fn": lambda **_: lambda *_: own_client_app(),  # Flower's looks where the server says
    }
    for name, function in own.items():
        getattr(run_clientapp, name)  # if Flower no longer has it, nothing is answered
        setattr(run_clientapp, name, function)
    flwr_clientapp()


def own_client_app() -> ClientApp:
    """The ClientApp of this package, by its place: the current folder may hold another one."""
    path = files.own_app() / "client_app.py"
    spec = importlib.util.spec_from_file_location("fedclip_client_app", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app: ClientApp = module.app
    return app


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
    """Whether the file is the one that this site has, or may differ from it, and hides nothing behind its end."""
    name = entry.filename
    own = b"" if name == LIST else (files.own_app() / name).read_bytes()
    if entry.file_size > (len(own) if name in APPS else LARGEST_TEXT) or entry.compress_type not in METHODS:
        return False
    entry.file_size += 1  # zipfile itself looks no further than this, but unpacks what is there
    with archive.open(entry) as file:
        data = file.read(entry.file_size)
    if len(data) == entry.file_size:
        return False
    return name == LIST or (_client_app(data) == _client_app(own) if name == DESCRIBED else data == own)


def _client_app(described: bytes) -> Any:
    return tomllib.loads(described.decode())["tool"]["flwr"]["app"]["components"]["clientapp"]


if __name__ == "__main__":
    answer()
