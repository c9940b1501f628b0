"""What a pinned SuperNode lets in. A real one, and a server that sends something else: tests/test_deploy.py."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedclip_flwr import content, pinned, simulation
from fedclip_flwr.errors import UserError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the bundle that Flower makes of this project's app."""
    folder = tmp_path_factory.mktemp("app")
    for name in (*pinned.APPS, "pyproject.toml"):
        shutil.copy(content.own_app() / name, folder)
    (folder / "README.md").touch()
    env = simulation.commands_found({"FLWR_HOME": str(folder / "flwr"), "PATH": ""})
    subprocess.run(["flwr", "build"], cwd=folder, env=env, check=True, capture_output=True)
    (fab,) = folder.glob("*.fab")
    with zipfile.ZipFile(fab) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(*files: tuple[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content_ in files:
            archive.writestr(name, content_)
    return data.getvalue()


def test_the_bundle_of_the_same_version_is_let_in(bundle: dict[str, bytes]) -> None:
    assert bundle.keys() == {*pinned.APPS, "pyproject.toml", pinned.LIST}
    pinned.check(packed(*bundle.items()))


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
