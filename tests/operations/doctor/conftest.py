"""A SuperLink with TLS and node keys, for all tests of `fedclip doctor`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace

import pytest

from deploy import processes
from fedclip_flwr.operations import keys
from tests import forked


@pytest.fixture(scope="package")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.SuperLink]:
    """It knows the key of the site north, and not that of south."""
    folder = tmp_path_factory.mktemp("secured")
    keys.make(folder / "keys", "localhost", ["north", "south"])
    with processes.superlink(folder / "superlink", folder / "keys") as link, pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "subprocess", SimpleNamespace(run=flower))
        link.register("north")
        yield link


def flower(command: Sequence[str], env: Mapping[str, str], **_: object) -> subprocess.CompletedProcess[str]:
    """One of Flower's commands, in a process that has Flower already."""
    return forked.run("from flwr.cli.app import app; app()", *command[1:], env=env)
