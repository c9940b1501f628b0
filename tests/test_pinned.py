"""What a pinned SuperNode lets in. A real one, and a server that sends something else: tests/test_deploy.py."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files

from fedclip_flwr import content, pinned
from fedclip_flwr.errors import UserError

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def built() -> bytes:
    """The bundle that Flower makes of this project's app."""
    names = (*pinned.APPS, "pyproject.toml")
    bundle, _ = build_fab_from_files({name: content.own_app() / name for name in names})
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
    with pytest.raises(UserError, match=f"brings another '{name}'"):
        pinned.check(packed(*bundle.items(), (name, bundle[name])))
    with pytest.raises(UserError, match=f"lacks {name}"):
        pinned.check(packed(*((other, data) for other, data in bundle.items() if other != name)))


def claimed(bundle: bytes, name: str, **facts: int) -> bytes:
    """The bundle, in whose directory other facts are told of the file of that name."""
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


def test_a_site_starts_a_supernode_that_finds_this_check_first(tmp_path: Path) -> None:
    """With a SuperNode's options passed on, and its ClientAppIo API on this machine alone."""
    python = tmp_path / "a python"
    python.write_text('#!/bin/sh\necho "$@"\ncat "$(command -v flwr-clientapp)"\n')
    python.chmod(0o755)
    code = "import sys; from fedclip_flwr import pinned; sys.executable = sys.argv[1]; pinned.start(sys.argv[2:])"

    def started(*options: str) -> list[str]:
        command = [sys.executable, "-c", code, str(python), *options]
        env = {"FEDCLIP_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
        env |= {key: value for key, value in os.environ.items() if key == "PYTHONPATH"}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()

    said, *script = started("--superlink", "here:9092")
    assert said == "-P -m fedclip_flwr.supernode --superlink here:9092 --clientappio-api-address 127.0.0.1:9094"
    assert script == ["#!/bin/sh", f"exec '{python}' -P -m fedclip_flwr.pinned \"$@\""]
    assert started("--clientappio-api-address=[::1]:7")[0].endswith(".supernode --clientappio-api-address=[::1]:7")
