"""What is published, built once, and environments with nothing else in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

TREE = Path(__file__).parents[2]
OURS = ("FEDCLIP_", "FLWR_", "PYTEST_", "PYTHON")
"""How variables begin that would reach what is installed; one keeps compiled code from being kept, too."""


class Environment:
    """A virtual environment, and a folder outside the tree in which its commands run."""

    def __init__(self, place: Path) -> None:
        self.root, self.work = place / "environment", place / "work"
        self.work.mkdir()
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
        self.env |= {"FEDCLIP_HOME": str(place / "home"), "FLWR_HOME": str(place / "flower"), "OMP_NUM_THREADS": "1"}
        self.env["PATH"] = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        subprocess.run([sys.executable, "-m", "venv", self.root], check=True)

    def install(self, *what: str | Path) -> None:
        done = self.run("python", "-m", "pip", "install", "--no-compile", *what)
        if done.returncode:
            pytest.fail(f"pip could not install {what}; it needs a package index:\n{done.stderr[-2000:]}", False)

    def run(self, *command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.root / "bin" / command[0], *command[1:]],
            cwd=cwd or self.work,
            env=self.env,
            capture_output=True,
            text=True,
        )

    def do(self, *command: str | Path, cwd: Path | None = None) -> str:
        """What the command prints; it has to succeed."""
        done = self.run(*command, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def environment(place: Path) -> Iterator[Environment]:
    """One that takes no room afterwards."""
    try:
        yield Environment(place)
    finally:
        shutil.rmtree(place)


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=TREE, check=True, capture_output=True, text=True).stdout
    return listed.rstrip("\0").split("\0")


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """What a release is made with, and wants newer things than Flower allows."""
    with environment(tmp_path_factory.mktemp("tools")) as made:
        made.install("build", "twine", "cyclonedx-bom")
        yield made


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree without what git does not know of."""
    copy = tmp_path_factory.mktemp("source")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TREE / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def dist(tools: Environment, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist and the wheel that was built from it."""
    made = tmp_path_factory.mktemp("dist")
    tools.do("python", "-m", "build", "--outdir", made, source)
    return made


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (file,) = dist.glob("*.whl")
    return file


@pytest.fixture(scope="session")
def metadata(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    unpacked = tmp_path_factory.mktemp("wheel")
    shutil.unpack_archive(wheel, unpacked, "zip")
    (described,) = unpacked.glob("*.dist-info")
    return Distribution.at(described)


def lowest(needed: Iterable[Requirement]) -> list[str]:
    """The oldest version of each that will do: `name==version`."""
    found: dict[str, Version] = {}
    for one in needed:
        (version,) = (Version(bound.version) for bound in one.specifier if bound.operator in (">=", "~=", "=="))
        found[one.name] = max(version, found.get(one.name, version))
    return [f"{name}=={version}" for name, version in found.items()]
