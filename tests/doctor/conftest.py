"""A SuperLink with TLS and node keys, for all tests of `fedclip doctor`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy import processes
from fedclip_flwr import keys


@pytest.fixture(scope="package")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.SuperLink]:
    """It knows the key of the site north, and not that of south."""
    folder = tmp_path_factory.mktemp("secured")
    keys.make(folder / "keys", "localhost", ["north", "south"])
    with processes.superlink(folder / "superlink", folder / "keys") as link:
        link.register("north")
        yield link
