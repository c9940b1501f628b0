"""The sdist and the wheel: what is in them, and what they tell of themselves."""

from __future__ import annotations

import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from fedclip_flwr import __version__
from tests.package.conftest import TREE, Environment, tracked

pytestmark = pytest.mark.package

PACKAGE = "fedclip_flwr/"
APP = ("pyproject.toml", "server_app.py", "client_app.py")
DESCRIBED = f"fedclip_flwr-{__version__}.dist-info/"
ABOUT = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")


def test_an_index_would_take_both(tools: Environment, dist: Path) -> None:
    files = list(dist.iterdir())
    assert len(files) == 2
    said = tools.do("twine", "check", "--strict", *files)
    assert said.count("PASSED") == 2


def test_the_wheel_has_the_package_and_its_app_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    package = {name for name in tracked() if name.startswith(PACKAGE)}
    assert {f"{PACKAGE}py.typed", f"{PACKAGE}bundled/model/model.safetensors"} < package
    app = {f"{PACKAGE}app/{name}": name for name in APP}
    assert files.keys() == {*package, *app, *(DESCRIBED + name for name in ABOUT)}
    for name in package | app.keys():
        assert files[name] == (TREE / app.get(name, name)).read_bytes()


def test_the_sdist_has_all_that_is_needed_to_build_and_test(dist: Path) -> None:
    (file,) = dist.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == {*tracked(), "PKG-INFO"}


def test_the_tree_and_the_sdist_make_the_same_wheel(
    tools: Environment, source: Path, wheel: Path, tmp_path: Path
) -> None:
    tools.do("python", "-m", "build", "--wheel", "--outdir", tmp_path, source)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_wheel_says_what_it_is(metadata: Distribution) -> None:
    fields = metadata.metadata
    assert (fields["Name"], fields["Version"], fields["License-Expression"]) == (
        "fedclip-flwr",
        __version__,
        "Apache-2.0",
    )
    assert fields.get_payload() == (TREE / "README.md").read_text("utf-8")  # type: ignore[attr-defined]
    assert fields["Description-Content-Type"] == "text/markdown"
    assert fields["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in (fields.get_all("Classifier") or [])
