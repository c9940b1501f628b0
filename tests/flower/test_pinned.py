"""The bundles that a pinned SuperNode accepts. For a real one and a server with another app: tests/test_deploy.py."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.clientapp import ClientApp
from flwr.supercore.superexec.executor import SubprocessExecutor
from flwr.supernode import cli
from flwr.supernode.runtime import run_clientapp

from fedclip_flwr.base import files
from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.exchange import records
from fedclip_flwr.flower import lines, pinned, superlink
from tests.flower import parts

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def built() -> bytes:
    """The bundle that Flower makes of this project's app."""
    names = (*pinned.APPS, "pyproject.toml")
    bundle, _ = build_fab_from_files({name: files.own_app() / name for name in names})
    return bundle


@pytest.fixture(scope="module")
def bundle(built: bytes) -> dict[str, bytes]:
    """Its files."""
    with zipfile.ZipFile(io.BytesIO(built)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(*files: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, content_ in files:
            archive.writestr(name, content_)
    return data.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_bundle_of_the_same_version_is_let_in(built: bytes, bundle: dict[str, bytes], method: int) -> None:
    assert bundle.keys() == {*pinned.APPS, "pyproject.toml", pinned.LIST}
    pinned.check(built)
    pinned.check(packed(*bundle.items(), method=method))


def test_settings_may_differ(bundle: dict[str, bytes]) -> None:
    described = bundle["pyproject.toml"].replace(b"num-server-rounds = 20", b"num-server-rounds = 7")
    assert described != bundle["pyproject.toml"]
    pinned.check(packed(*(bundle | {"pyproject.toml": described}).items()))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("client_app.py", b"print('everything that you have')"),  # instead of, and as well as, the own one
        ("torch.py", b""),
        ("fedclip_flwr/__init__.py", b""),
        (".info/../client_app.py", b""),
        ("pyproject.toml", b'[tool.flwr.app.components]\nclientapp = "server_app:app"'),
        ("pyproject.toml", b'[tool.flwr.app.components]\nclientapp = "client_app:app"\nagentapp = "os:x"'),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_whatever_else_it_brings_is_refused(bundle: dict[str, bytes], name: str, data: bytes, first: bool) -> None:
    files = [*bundle.items(), (name, data)]
    with pytest.raises(UserError, match="install the same version"):
        pinned.check(packed(*(reversed(files) if first else files)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["client_app.py", "pyproject.toml", pinned.LIST])
def test_each_file_is_there_once(bundle: dict[str, bytes], name: str) -> None:
    with pytest.raises(UserError, match=f"differs from this site's in '{name}'"):
        pinned.check(packed(*bundle.items(), (name, bundle[name])))
    with pytest.raises(UserError, match=f"lacks {name}"):
        pinned.check(packed(*((other, data) for other, data in bundle.items() if other != name)))


def claimed(bundle: bytes, name: str, **facts: int) -> bytes:
    """The bundle, in whose directory other facts are given for the file of that name."""
    places = {"flags": ("<H", 8), "method": ("<H", 10), "crc": ("<I", 16), "size": ("<I", 24), "offset": ("<I", 42)}
    changed, start = bytearray(bundle), bundle.rindex(b"PK\x01\x02", 0, bundle.rindex(name.encode()))
    for fact, number in facts.items():
        kind, place = places[fact]
        struct.pack_into(kind, changed, start + place, number)
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, zipfile.ZIP_DEFLATED) for name in ("client_app.py", "torch.py", "pyproject.toml", pinned.LIST)),
        ("client_app.py", zipfile.ZIP_BZIP2),
        ("client_app.py", zipfile.ZIP_LZMA),
    ],
)
@pytest.mark.parametrize("beyond", [0, 1, None], ids=["hidden", "hidden but for a byte", "not hidden"])
def test_no_more_is_unpacked_than_a_file_may_hold(
    bundle: dict[str, bytes], name: str, method: int, beyond: int | None
) -> None:
    """Where a few bytes of a bundle hold 4 megabytes, which its directory may hide."""
    own = bundle.get(name, b"")
    large = own.ljust(4 * MEGABYTE)
    bomb = packed(*(bundle | {name: large}).items(), method=method)
    if beyond is not None:
        bomb = claimed(bomb, name, size=len(own), crc=zlib.crc32(large[: len(own) + beyond]))
    assert len(bomb) < 50_000
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="install the same version"):
            pinned.check(bomb)
        assert tracemalloc.get_traced_memory()[1] < MEGABYTE
    finally:
        tracemalloc.stop()


def test_a_bundle_of_very_many_files_is_not_even_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    many = packed(*((str(number), b"") for number in range(1000)))
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("it is read"))
    with pytest.raises(UserError, match="is larger than"):
        pinned.check(many)


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda built: b"",
        lambda built: b"what is this?",
        lambda built: built[: len(built) // 2],
        lambda built: claimed(built, "client_app.py", flags=1),  # encrypted
        lambda built: claimed(built, "client_app.py", offset=2**31),
        lambda built: claimed(built, "client_app.py", method=8),
        lambda built: built.replace(b"import", b"export", 1),
        lambda built: packed(("pyproject.toml", b"a = " + b"[" * 20_000)),
        lambda built: packed(("pyproject.toml", b"\xff")),
        lambda built: packed(("pyproject.toml", b"tool = 3")),
    ],
)
def test_what_can_not_be_read_is_refused_in_one_line(built: bytes, spoilt: Callable[[bytes], bytes]) -> None:
    with pytest.raises(UserError, match="install the same version") as error:
        pinned.check(spoilt(built))
    assert "\n" not in str(error.value)


def test_a_message_is_answered_by_the_installed_app_wherever_the_servers_names_lead(
    built: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower itself installs the bundle, and loads the app from a folder whose path is made of what the server says."""
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copy(files.own_app() / "pyproject.toml", folder)
    (folder / "client_app.py").write_text("raise AssertionError('another app is loaded')")
    loaded: list[ClientApp] = []
    used: Any = run_clientapp

    def flowers() -> None:
        used.install_from_fab(built, skip_prompt=True)
        load = used.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
        version = f"0.1.0.{hashlib.sha256(built).hexdigest()[:8]}/../../../other/"
        loaded.append(load("fedclip-flwr/fedclip-flwr", version, ""))
        with pytest.raises(UserError, match="install the same version"):
            used.install_from_fab(b"another", skip_prompt=True)

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "client_app", raising=False)
    for name in ("install_from_fab", "get_load_client_app_fn"):
        monkeypatch.setattr(run_clientapp, name, getattr(run_clientapp, name))  # put back at the end
    monkeypatch.setattr(cli, "flwr_clientapp", flowers)
    pinned.answer()
    (app,) = loaded
    context = Context(1, 2, {"site": "north"}, RecordDict(), Settings().as_run_config())
    answer = app(Message(RecordDict({"config": records.write_task("unknown")}), 2, "train"), context)
    assert "session not found" in str(answer.error.reason)
    assert not (tmp_path / "home").exists()


class BecameError(Exception):
    """In place of becoming another program: with that command and environment."""

    def __init__(self, path: str, command: list[str], env: dict[str, str]) -> None:
        super().__init__(path)
        self.command, self.path, self.env = command, env["PATH"], env

    @classmethod
    def of(cls, path: str, command: list[str], env: dict[str, str]) -> NoReturn:
        raise cls(path, command, env)


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Python with a space in its path, in whose environment sites start."""
    python = tmp_path / "an environment" / "python"
    python.parent.mkdir()
    for program in (python, python.with_name("flwr-clientapp")):
        program.touch(0o755)
    monkeypatch.setattr(os, "execve", BecameError.of)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "home"))
    return str(python)


def started(*options: str) -> BecameError:
    with pytest.raises(BecameError) as became:
        pinned.start(options)
    return became.value


def test_a_site_starts_a_supernode_that_finds_its_own_command_first(python: str) -> None:
    """With a SuperNode's options passed on, and its ClientAppIo API on this machine alone."""
    site = started("--superlink", "here:9092")
    words = ["-P", "-m", "fedclip_flwr.flower.supernode", "--superlink", "here:9092"]
    assert site.command == [python, *words, *lines.address(lines.line().site_address, "127.0.0.1:9094")]
    own = shutil.which("flwr-clientapp", path=site.path)
    assert own
    assert Path(own).read_text() == f"#!/bin/sh\nexec '{python}' -P -m fedclip_flwr.flower.pinned \"$@\"\n"
    for option in ("--clientappio-api-address=[::1]:7", "--clientapp=[::1]:7"):
        assert started(option).command[4:] == lines.address(lines.line().site_address, "[::1]:7")


@pytest.mark.parametrize("address", ["0.0.0.0:9094", ":9094", "9094", "[::]:9094", "fl.example.org:9094"])
def test_a_site_listens_on_its_own_machine_only(python: str, address: str) -> None:
    with pytest.raises(UserError, match=rf"-address {re.escape(address)}: anyone who reaches it can answer for this"):
        pinned.start(["--clientappio-api-address", address])


def test_nothing_is_installed_at_a_run_of_a_server(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = lines.NO_INSTALLATION
    monkeypatch.delenv(name)
    with pytest.raises(BecameError) as became:
        superlink.start([])
    assert became.value.env[name] == "1"


def test_a_database_in_no_folder_is_refused(python: str, tmp_path: Path) -> None:
    for option in (["--database", f"{tmp_path}/none/superlink.db"], [f"--database={tmp_path}/none/superlink.db"]):
        with pytest.raises(UserError, match=f"superlink.db: there is no folder {tmp_path}/none; make it"):
            superlink.start(option)
    for database in (f"{tmp_path}/superlink.db", "superlink.db", ":flwr-in-memory:", f"sqlite:///{tmp_path}/x.db"):
        with pytest.raises(BecameError):
            superlink.start(["--database", database])


def test_no_other_program_of_flower_runs_at_a_site(python: str) -> None:
    """A server names the kind of a task, and for each kind Flower has a program that runs what the server sent."""
    site, tasks = started(), lines.module("programs").TASKS
    assert pinned.COMMAND in tasks
    for task in tasks:
        program = shutil.which(task, path=site.path)
        assert program
        assert ("flower.refusing" in Path(program).read_text()) == (task != pinned.COMMAND)


def test_the_program_for_other_tasks_refuses() -> None:
    done = subprocess.run([sys.executable, "-m", "fedclip_flwr.flower.refusing", "--token", "1"], capture_output=True)
    assert done.returncode == 1
    assert b"runs only its installed ClientApp" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        "--isolation process",
        "--isolation=process",
        "--iso=process",
        "--isolation=subprocess --isolation=process",
        "--allow-runtime-dependency-installation",
        "--allow",
    ],
)
def test_options_by_which_other_code_would_run_are_refused(python: str, options: str) -> None:
    with pytest.raises(UserError, match=r"^--(isolation|allow-runtime-dependency-installation): .* leave it out$"):
        pinned.start(["--insecure", *options.split()])
    assert started("--isolation", "subprocess")


@pytest.mark.parametrize(
    "calls",
    [
        [(["/elsewhere/bin/flwr-clientapp", "--token", "1"], {})],
        [([sys.executable, "-m", "flwr.supernode.cli.flwr_clientapp", "--token", "1"], {})],
        [(["flwr-clientapp", "--token", "1"], {"env": {"PATH": "/elsewhere/bin"}})],
        [(["flower-clientapp", "--token", "1"], {})],
        [(["flwr-clientapp", "--token", "1"], {}), (["flower-clientapp", "--token", "1"], {})],
        [],
    ],
)
def test_a_flower_that_would_start_another_program_than_this_sites_is_refused(
    python: str, calls: list[tuple[list[str], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started()

    def launch(*_: object) -> None:
        for command, more in calls:
            subprocess.Popen(command, **more)

    monkeypatch.setattr(SubprocessExecutor, "launch", launch)
    with pytest.raises(UserError, match=r"Flower would not start .*/home/bin/flwr-[a-z]+ for a task, but"):
        pinned.start([])


def test_a_flower_that_has_no_such_plugin_is_refused(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.ExecPlugin, "__init__", lambda *_: pytest.fail("it takes other things"))
    with pytest.raises(UserError, match="Flower would not start"):
        pinned.start([])


def test_a_folder_that_can_not_be_found_by_path_is_refused(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCLIP_HOME", str(tmp_path / "a:b"))
    with pytest.raises(UserError, match="set FEDCLIP_HOME to a folder"):
        pinned.start([])


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("client_app.py", b"import", b"export"),
        ("server_app.py", b"import", b"export"),
        ("pyproject.toml", b'clientapp = "client_app:app"', b'clientapp = "server_app:app"'),
    ],
)
def test_a_file_of_the_same_size_with_other_contents_is_refused(
    bundle: dict[str, bytes], name: str, old: bytes, new: bytes
) -> None:
    other = bundle[name].replace(old, new)
    assert other != bundle[name]
    with pytest.raises(UserError, match=f"differs from this site's in '{name}'"):
        pinned.check(packed(*(bundle | {name: other}).items()))
